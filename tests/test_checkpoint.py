"""A checkpoint is whole or absent, whatever happens to the process, the disk or the bytes; peft reads its adapter."""

import ast
import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import lorl
from lorl import checkpoint
from lorl.checkpoint import Adapter, Checkpoint, SaveFailed
from lorl.errors import UserError


def example(step: int, rows: int = 4) -> Checkpoint:
    """A checkpoint whose every value tells its step."""
    full = torch.full((rows, 8), float(step))
    adapter = Adapter(
        {"base_model.model.q.lora_A.weight": full, "base_model.model.q.lora_B.weight": full.T},
        {"peft_type": "LORA", "r": rows, "target_modules": {"q", "k"}},
    )
    optimizer = {"q.exp_avg": full / 3, "q.step": torch.tensor(float(step))}
    return Checkpoint(step, {"adapter": adapter}, optimizer, {"step": step, "best": 0.1 * step, "rng": [2**63 + step]})


def assert_holds(path: Path, step: int) -> None:
    loaded, want = checkpoint.load(path), example(step)
    assert loaded.step == step
    assert loaded.state == want.state
    assert loaded.adapters["adapter"].config == {"peft_type": "LORA", "r": 4, "target_modules": ["k", "q"]}
    for got, expected in (
        (loaded.adapters["adapter"].tensors, want.adapters["adapter"].tensors),
        (loaded.optimizer, want.optimizer),
    ):
        assert set(got) == set(expected)
        assert all(torch.equal(got[name], expected[name]) for name in expected)


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_saved_is_loaded(tmp_path: Path):
    path = checkpoint.save(tmp_path, example(10))
    assert path == tmp_path / "step-10"
    assert_holds(path, 10)
    assert [str(file.relative_to(path)) for file in files_of(path)] == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "state.json",
    ]


def test_several_adapters_and_every_dtype(tmp_path: Path):
    dtypes = {str(t): torch.ones(3, dtype=t) for t in (torch.bfloat16, torch.float64, torch.int64, torch.bool)}
    wide = torch.arange(12.0).reshape(3, 4)
    saved = Checkpoint(
        1, {"adapter": Adapter({"view": wide[:, :2], "other": wide[:, 2:]}, {}), "critic": Adapter(dtypes, {})}
    )
    loaded = checkpoint.load(checkpoint.save(tmp_path, saved))
    assert set(loaded.adapters) == {"adapter", "critic"}
    assert torch.equal(loaded.adapters["adapter"].tensors["other"], wide[:, 2:])
    assert {name: t.dtype for name, t in loaded.adapters["critic"].tensors.items()} == {
        name: t.dtype for name, t in dtypes.items()
    }
    assert loaded.optimizer == {}


def test_the_latest_is_the_highest_number_and_not_the_last_name(tmp_path: Path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "absent") is None
    for step in (9, 100, 20):
        checkpoint.save(tmp_path, example(step))
    assert checkpoint.latest(tmp_path) == tmp_path / "step-100"


def test_saving_a_step_again_replaces_it(tmp_path: Path):
    first = checkpoint.save(tmp_path, example(3))
    inode = first.stat().st_ino
    assert checkpoint.save(tmp_path, example(3)).stat().st_ino == inode  # the same content is left alone
    changed = Checkpoint(3, example(3).adapters, {}, {"best": 1})
    checkpoint.save(tmp_path, changed)
    assert checkpoint.load(first).state == {"best": 1}
    (first / "state.json").write_text("{}")
    checkpoint.save(tmp_path, example(3))
    assert_holds(first, 3)
    assert os.listdir(tmp_path) == ["step-3"]


# Killed at any moment


def save_in_child(root: Path, made: Checkpoint, fatal_call: int) -> int:
    """Saves in a forked process that SIGKILLs itself at its `fatal_call`th change to the file system (half-way when it
    is a write), and returns that process's exit code: 0 if it had fewer calls than that."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        calls = 0

        def deadly(function):
            def wrapped(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == fatal_call:
                    if function is write:
                        write(args[0], args[1][: len(args[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return wrapped

        write = os.write
        for name in ("open", "write", "fsync", "rename", "replace", "mkdir", "rmdir", "unlink"):
            setattr(os, name, deadly(getattr(os, name)))
        checkpoint.save(root, made)
        os._exit(0)
    finally:
        os._exit(1)


def test_killed_at_every_call_of_a_save(tmp_path: Path):
    outcomes = []
    for call in range(1, 1000):
        root = tmp_path / str(call)
        checkpoint.save(root, example(1))
        code = save_in_child(root, example(2), call)
        newest = checkpoint.latest(root)
        assert newest is not None
        step = int(newest.name.removeprefix("step-"))
        assert_holds(newest, step)
        outcomes.append(step)
        checkpoint.save(root, example(2))  # the next process cleans up and goes on
        assert sorted(os.listdir(root)) == ["step-1", "step-2"]
        assert_holds(root / "step-2", 2)
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert outcomes == sorted(outcomes)
    assert outcomes.count(1) > 15
    assert outcomes.count(2) >= 2  # also after the rename


def test_killed_at_every_call_of_a_replacement(tmp_path: Path):
    again = Checkpoint(2, example(2).adapters, {}, {"again": True})
    states = []
    for call in range(1, 1000):
        root = tmp_path / str(call)
        checkpoint.save(root, example(2))
        code = save_in_child(root, again, call)
        newest = checkpoint.latest(root)
        assert newest is not None
        loaded = checkpoint.load(newest)
        assert loaded.step == 2
        states.append("again" in loaded.state)
        checkpoint.save(root, again)
        assert os.listdir(root) == ["step-2"]
        assert checkpoint.load(root / "step-2").state == {"again": True}
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert states == sorted(states)
    assert set(states) == {False, True}


def test_leftovers_of_a_living_process_are_left_alone(tmp_path: Path):
    other = tmp_path / f".tmp-step-5-{os.getppid()}"
    other.mkdir()
    mine = tmp_path / f".tmp-step-5-{os.getpid()}"
    mine.mkdir()
    checkpoint.save(tmp_path, example(6))
    assert other.is_dir()
    assert not mine.exists()


# Damaged and foreign folders

FILES = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "manifest.json", "optimizer.safetensors"]
FILES.append("state.json")


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_anywhere_is_refused(tmp_path: Path, name: str):
    path = checkpoint.save(tmp_path, example(1))
    whole = (path / name).read_bytes()
    for position in range(len(whole)):
        flipped = bytearray(whole)
        flipped[position] ^= 0xFF
        (path / name).write_bytes(flipped)
        with pytest.raises(UserError):
            checkpoint.load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["cut", "emptied", "removed", "grown"])
def test_latest_falls_back_past_a_damaged_step_and_says_so(tmp_path: Path, caplog, name: str, how: str):
    checkpoint.save(tmp_path, example(1))
    file = checkpoint.save(tmp_path, example(2)) / name
    whole = file.read_bytes()
    if how == "removed":
        file.unlink()
    else:
        file.write_bytes({"cut": whole[:-2], "emptied": b"", "grown": whole + b"\0"}[how])
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    (record,) = caplog.records
    assert "step-2" in record.getMessage()
    assert name in record.getMessage()
    with pytest.raises(UserError, match="step-2"):
        checkpoint.load(tmp_path / "step-2")


def test_a_flipped_byte_of_the_adapter_names_the_file(tmp_path: Path, caplog):
    checkpoint.save(tmp_path, example(1))
    tensors = checkpoint.save(tmp_path, example(2)) / "adapter" / "adapter_model.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    tensors.write_bytes(data)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1"
    assert "adapter/adapter_model.safetensors is not what was saved" in caplog.text


def test_a_step_under_another_number_is_refused(tmp_path: Path):
    os.rename(checkpoint.save(tmp_path, example(1)), tmp_path / "step-7")
    assert checkpoint.latest(tmp_path) is None
    os.rename(tmp_path / "step-7", tmp_path / "my-best")  # a name of the user's own is no claim
    assert_holds(tmp_path / "my-best", 1)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"version": 2}, "format 2"),
        ({"format": "other"}, "not a checkpoint of lorl"),
        ({"step": "1"}, "manifest.json"),
        ({"files": []}, "manifest.json"),
        ({"files": {"../../outside": {"bytes": 1, "sha256": ""}}}, "manifest.json"),
    ],
)
def test_a_foreign_manifest_is_refused(tmp_path: Path, change: dict, part: str):
    path = checkpoint.save(tmp_path, example(1))
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=part):
        checkpoint.load(path)


def test_what_is_no_checkpoint_is_refused_with_a_way_on(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoint.load(tmp_path / "step-1")
    checkpoint.save(tmp_path / "run" / "checkpoints", example(4))
    for folder in ("run", "run/checkpoints"):
        with pytest.raises(UserError, match=r"name a step's folder, such as .*step-4"):
            checkpoint.load(tmp_path / folder)


class Canary:
    def __init__(self, touched: Path):
        self.touched = touched

    def __reduce__(self):
        return (Path.touch, (self.touched,))


@pytest.mark.parametrize("name", FILES)
def test_a_pickle_in_place_of_a_file_is_never_run(tmp_path: Path, name: str):
    path, touched = checkpoint.save(tmp_path, example(1)), tmp_path / "touched"
    data = pickle.dumps(Canary(touched))
    (path / name).write_bytes(data)
    if name != "manifest.json":  # with a manifest that vouches for it
        manifest = json.loads((path / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        checkpoint.load(path)
    assert not touched.exists()
    pickle.loads(data)
    assert touched.exists()  # the canary sings where a pickle is loaded


# Full disks


def test_a_file_that_may_not_grow_fails_the_save_and_nothing_else(tmp_path: Path):
    checkpoint.save(tmp_path, example(1))
    child = os.fork()
    if not child:
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))  # a write past it is short, then EFBIG
            checkpoint.save(tmp_path, example(2))
        except SaveFailed:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert os.listdir(tmp_path) == ["step-1"]
    assert_holds(tmp_path / "step-1", 1)


@pytest.fixture
def small_disk(tmp_path: Path):
    """A file system of 3 MiB."""
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", tmp_path], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs takes root")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_fails_the_save_and_training_can_go_on(small_disk: Path, monkeypatch, foreseen: bool):
    checkpoint.save(small_disk, example(1))
    if not foreseen:  # a quota does not show in the free space
        plenty = shutil.disk_usage("/")._replace(free=2**40)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)
    with pytest.raises(SaveFailed, match="step 2 was not saved") as caught:
        checkpoint.save(small_disk, example(2, rows=2**15))
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert ("MiB needed" in str(caught.value)) == foreseen
    assert os.listdir(small_disk) == ["step-1"]
    assert_holds(small_disk / "step-1", 1)
    checkpoint.save(small_disk, example(3))  # and what fits is saved again
    assert_holds(small_disk / "step-3", 3)


# Pruning


def test_prune_keeps_the_newest_and_the_protected(tmp_path: Path):
    for step in (1, 2, 3, 4, 10):
        checkpoint.save(tmp_path, example(step))
    assert sorted(checkpoint.prune(tmp_path, keep=2, protect={2})) == [1, 3]
    assert sorted(os.listdir(tmp_path)) == ["step-10", "step-2", "step-4"]


def test_prune_does_not_count_a_damaged_step(tmp_path: Path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, example(step))
    (tmp_path / "step-3" / "optimizer.safetensors").write_bytes(b"")
    assert checkpoint.prune(tmp_path, keep=1) == [1]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-2"


# Others' eyes


def test_peft_loads_the_adapter_folder(tmp_path: Path):
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        want = model(tokens).logits
    adapter = Adapter(get_peft_model_state_dict(model), model.peft_config["default"].to_dict())
    path = checkpoint.save(tmp_path, Checkpoint(1, {"adapter": adapter}))

    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(plain)
    with torch.no_grad():
        before = fresh(tokens).logits
        again = PeftModel.from_pretrained(fresh, str(path / "adapter"))(tokens).logits
    assert not torch.allclose(before, want, atol=1e-3)
    assert torch.equal(again, want)


def forbidden(node: ast.AST) -> str | None:
    """What a syntax node does that may run code out of data; None if it doesn't."""
    unsafe = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    if isinstance(node, ast.Import):
        names = {alias.name.partition(".")[0] for alias in node.names}
        return f"import of {names & unsafe}" if names & unsafe else None
    if isinstance(node, ast.ImportFrom):
        return f"import from {node.module}" if (node.module or "").partition(".")[0] in unsafe else None
    if not isinstance(node, ast.Call):
        return None
    called = ast.unparse(node.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if called in {"eval", "exec", "builtins.eval", "builtins.exec"}:
        return called
    if called in {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"}:
        return called
    if called == "torch.load" and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    return "allow_pickle" if keywords.get("allow_pickle") == "True" else None


def test_nothing_in_lorl_runs_code_out_of_data():
    package = Path(lorl.__file__).parent
    found = [
        f"{file.relative_to(package)}:{node.lineno}: {what}"
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if (what := forbidden(node))
    ]
    assert not found


@pytest.mark.parametrize(
    "code", ["import pickle", "from pickle import loads", "torch.load(f)", "yaml.load(f)", "eval(x)", "exec(x)"]
)
def test_that_check_sees_what_it_is_for(code: str):
    assert any(forbidden(node) for node in ast.walk(ast.parse(code)))

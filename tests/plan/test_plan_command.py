"""`lorl plan` as a user meets it, and the page that is made of its plans."""

import json
import runpy
from pathlib import Path

import pytest

from lorl.parallel.combinations import check_combination
from lorl.plan.shape import BUILT_IN
from lorl.settings import load
from lorl_command import Forks

ROOT = Path(__file__).parents[2]
EIGHT = ("--gpus", "8", "--gpu-memory", "80GB")


def test_a_plan_is_read_off_a_config_json_alone(forks: Forks, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BUILT_IN["qwen2.5-72b"]))
    words = (*EIGHT, "--strategy", "shared", "--json")
    by_folder = forks.run("plan", f"model.path={folder}", *words, cwd=tmp_path)
    by_name = forks.run("plan", "model.path=qwen2.5-72b", *words, cwd=tmp_path)
    assert (by_folder.code, by_folder.out) == (0, by_name.out)
    found = json.loads(by_folder.out)
    assert (found["strategy"], found["fits"], found["change"]) == ("shared", True, None)
    assert found["bytes"]["base"]["training"] == -(-72_706_203_648 * 2 // found["shard"])
    assert found["training_bytes"] == sum(held["training"] for held in found["bytes"].values()) <= found["gpu_bytes"]
    assert found["seconds_a_step"] == pytest.approx(sum(found["seconds"].values()))


def test_auto_prints_the_layout_that_the_run_takes(forks: Forks, tmp_path: Path) -> None:
    """One that it can be started in: `lorl plan` and the run ask the same function."""
    words = ["model.path=qwen2.5-72b", "parallel.gpus=8"]
    found = json.loads(forks.run("plan", *words, "--gpu-memory", "80GB", "--json", cwd=tmp_path).out)
    assert found["strategy"] != "ddp"
    check_combination(load(None, [*words, f"parallel.strategy={found['strategy']}"]))
    whole = json.loads(forks.run("plan", *words, "adapter.dora=true", "--json", cwd=tmp_path).out)
    assert whole["strategy"] == "ddp", "DoRA reads whole weights, and the start says so"
    parts = json.loads(forks.run("plan", *words, "parallel.shard_size=4", "--json", cwd=tmp_path).out)
    assert parts["shard"] == 4


def test_it_is_said_where_vllm_has_no_layout(forks: Forks, tmp_path: Path) -> None:
    """Three GPUs cannot share 64 heads, and the base is too large for one."""
    result = forks.run("plan", "model.path=qwen2.5-72b", "--gpus", "3", "--json", cwd=tmp_path)
    found = json.loads(result.out)
    assert (found["engine"], found["engine_gpus"], found["shard"]) == ("torch", 1, 3)
    assert "the embedded engine samples: with vLLM no layout fits" in found["assumed"]
    vllm = json.loads(forks.run("plan", "model.path=qwen2.5-72b", *EIGHT, "--json", cwd=tmp_path).out)
    assert vllm["engine"] == "vllm"
    assert not any("embedded" in note for note in vllm["assumed"])


def test_a_reward_model_of_its_own_takes_its_whole_bytes_and_an_adapter_its_own(forks: Forks, tmp_path: Path) -> None:
    def bytes_with(*words: str) -> tuple[dict[str, int], list[str]]:
        found = json.loads(forks.run("plan", "model.path=qwen2.5-1.5b", *words, "--json", cwd=tmp_path).out)
        return {holder: held["sampling"] for holder, held in found["bytes"].items()}, found["assumed"]

    adapter = tmp_path / "judge"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"r": 64, "target_modules": "all-linear"}')
    plain, _ = bytes_with()
    own, _ = bytes_with("reward_model.path=qwen2.5-7b")
    assert own["reward model of its own"] == 2 * 7_615_616_512
    assert own["adapters, float32 masters"] == plain["adapters, float32 masters"]
    third, _ = bytes_with(f"reward_model.path={adapter}")
    assert third["reward model of its own"] == 0
    assert third["adapters, float32 masters"] == 3 * plain["adapters, float32 masters"]  # twice the policy's rank
    _, notes = bytes_with("reward_model.path=somebody/judge")
    assert any(note.startswith("reward_model.path=somebody/judge: lorl does not know its shape") for note in notes)


def test_the_tables_say_what_holds_memory_where_time_goes_and_whether_it_fits(forks: Forks, tmp_path: Path) -> None:
    result = forks.run("plan", "model.path=qwen2.5-7b", "algorithm.kl_coef=0.01", "--gpus", "2", cwd=tmp_path)
    assert result.code == 0, result.err
    holders = (
        "base",
        "adapters, float32 masters",
        "gradients",
        "optimizer",
        "KV cache",
        "activations of a micro-batch",
    )
    for text in (*holders, "rollout", "log-probabilities", "update", "publish", "fits: ", "assumed: "):
        assert text in result.out


def test_a_run_that_does_not_fit_ends_with_2_and_names_the_setting(forks: Forks, tmp_path: Path) -> None:
    words = ("model.path=qwen2.5-32b", "model.gradient_checkpointing=false", "parallel.microbatch_tokens=2048")
    result = forks.run("plan", *words, "--json", cwd=tmp_path)
    assert result.code == 2
    assert json.loads(result.out)["change"] == ["model.gradient_checkpointing=true"]
    told = forks.run("plan", *words, cwd=tmp_path)
    assert told.code == 2
    assert "model.gradient_checkpointing=true" in told.out
    helpless = forks.run("plan", "model.path=qwen2.5-72b", "--gpu-memory", "8GiB", cwd=tmp_path)
    assert helpless.code == 2
    assert "no setting helps" in helpless.out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("model.path=qwen2.5-72",), "did you mean 'qwen2.5-72b'?"),
        (("--gpus", "0"), "--gpus 0: at least one GPU is needed"),
        (("--gpus", "3", "parallel.nodes=2"), "--gpus 3 does not divide among parallel.nodes=2"),
        (("--gpu-memory", "80XB"), "--gpu-memory 80XB: expected a size such as 80GB or 79GiB"),
        (("--gpu-memory", "0GB"), "--gpu-memory 0GB: expected a size"),
        (("--gpu", "h10"), "did you mean 'h100'?"),
        (("--strategy", "fsdp3"), "did you mean 'fsdp'?"),
        (("--strategy", "shared"), "--strategy shared spreads the base over several GPUs, and there is one"),
        (("--strategy", "fsdp2", "--gpus", "16", "parallel.nodes=2"), "parallel.shard_size=2 or 4 would do"),
        (("--strategy", "fsdp2", "--gpus", "4", "parallel.shard_size=3"), "parallel.shard_size=2 or 4 would do"),
        (("--gpus", "4", "parallel.shard_size=3"), "parallel.shard_size=3 does not divide the 4 ranks"),
        (("--gpus", "2", "parallel.sequence=2", "rollout.engine=vllm"), "parallel.sequence splits each pass"),
        (("--bandwidth", "nvlnk=3GB"), "did you mean 'nvlink'?"),
        (("--bandwidth", "nvlink=fast"), "--bandwidth nvlink fast: expected a size"),
        (("adapter.target_modules=[q_prj]",), "did you mean 'q_proj'?"),
        (("modl.path=x",), "unknown key 'modl.path'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_words_get_one_sentence(forks: Forks, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    model = () if words[0].startswith("mod") else ("model.path=qwen2.5-7b",)
    result = forks.run("plan", *model, *words, cwd=tmp_path)
    assert (result.code, result.out) == (2, "")
    assert said in result.err
    assert result.err.count("\n") == 1


def test_slower_links_take_longer(forks: Forks, tmp_path: Path) -> None:
    words = ("plan", "model.path=qwen2.5-72b", *EIGHT, "--strategy", "fsdp2", "--json")
    fast = json.loads(forks.run(*words, cwd=tmp_path).out)
    slow = json.loads(forks.run(*words, "--bandwidth", "nvlink=5GB", cwd=tmp_path).out)
    assert slow["bound"]["update"] == "links" != fast["bound"]["update"]
    assert slow["seconds"]["update"] > fast["seconds"]["update"]


def test_the_scaling_page_is_what_its_script_writes() -> None:
    """Where the formulas moved: `python benchmarks/scaling.py docs/scaling.md`."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "scaling.py"))
    assert (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8") == script["markdown"]()

"""parallel.strategy=auto: what the plan says of the devices decides, among what a run can be started with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lorl.config import RunConfig
from lorl.errors import UserError
from lorl.parallel import auto
from lorl.parallel.auto import Device, settle
from lorl.parallel.combinations import check_combination
from lorl.plan.hardware import GIB
from lorl.plan.layout import Layout
from lorl.plan.shape import BUILT_IN
from lorl.settings import load
from lorl_command import Forks, small_run

H100 = Device("NVIDIA H100 80GB HBM3", int(79.1 * GIB))


@pytest.fixture
def folder_of(tmp_path: Path) -> Callable[[str], Path]:
    """A model's folder with nothing but its config.json, by a name that the plan knows."""

    def write(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(BUILT_IN[name]))
        return folder

    return write


def run_on(folder: Path, *keys: str) -> RunConfig:
    words = [f"model.path='{folder}'", "model.random_weights=true", "parallel.gpus=8", "rollout.engine=torch", *keys]
    return load(None, words)


def test_a_model_that_fits_a_gpu_is_whole_on_each(folder_of: Callable[[str], Path]) -> None:
    settled, why = settle(run_on(folder_of("qwen2.5-1.5b")), [H100] * 8)
    assert settled.parallel.strategy == "ddp"
    assert why.startswith("parallel.strategy=auto: ddp, which takes ")
    assert why.endswith(" of 79.1 GiB a GPU")


def test_a_model_that_does_not_is_spread_and_the_line_says_why(folder_of: Callable[[str], Path]) -> None:
    config = run_on(folder_of("qwen2.5-72b"))
    settled, why = settle(config, [H100] * 8)
    assert settled.parallel.strategy not in ("auto", "ddp")
    check_combination(settled)
    assert f"parallel.strategy=auto: {settled.parallel.strategy}, base over 8" in why
    assert ", since ddp needs 1" in why
    assert why.endswith(" of 79.1 GiB a GPU")
    assert settled.model_copy(update={"parallel": config.parallel}) == config, "nothing else changes"


def test_the_smallest_gpu_decides(folder_of: Callable[[str], Path]) -> None:
    small = replace(H100, memory=16 * GIB)
    settled, why = settle(run_on(folder_of("qwen2.5-7b")), [H100] * 7 + [small])
    assert settled.parallel.strategy != "ddp"
    assert why.endswith(" of 16.0 GiB a GPU")


def test_cpu_processes_are_whole_unless_the_hosts_memory_is_short(folder_of: Callable[[str], Path]) -> None:
    config = run_on(folder_of("qwen2.5-1.5b"), "parallel.gpus=2", "parallel.microbatch_tokens=2048")
    settled, why = settle(config, [Device(None, 40 * GIB)] * 2)
    assert settled.parallel.strategy == "ddp"
    assert why.endswith(" of 40.0 GiB a process")
    settled, why = settle(config, [Device(None, 8 * GIB)] * 2)
    assert settled.parallel.strategy != "ddp"
    assert "since ddp needs" in why


def test_what_the_start_refuses_is_not_chosen_and_what_it_learns_is(
    folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only list of strategies is what the schema and the start let pass."""
    accepted = {"ddp"}

    def check(config: RunConfig) -> None:
        if config.parallel.strategy not in accepted:
            raise UserError("not here")

    monkeypatch.setattr(auto, "check_combination", check)
    config = run_on(folder_of("qwen2.5-72b"))
    settled, why = settle(config, [H100] * 8)
    assert settled.parallel.strategy == "ddp"
    assert "nothing fits, and this lacks least" in why
    accepted.add("fsdp")
    assert settle(config, [H100] * 8)[0].parallel.strategy == "fsdp"


def test_a_base_that_is_to_lie_in_host_memory_is_planned_there(folder_of: Callable[[str], Path]) -> None:
    config = run_on(folder_of("qwen2.5-7b"), "parallel.param_offload=true", "parallel.gpus=1")
    settled, why = settle(config, [H100])
    assert settled.parallel.strategy == "ddp"
    assert why.startswith("parallel.strategy=auto: ddp, offloaded, which takes ")
    settled, why = settle(run_on(folder_of("qwen2.5-72b"), "parallel.param_offload=true"), [H100] * 8)
    assert settled.parallel.strategy in ("fsdp", "fsdp2")
    assert "offloaded, planned at" in why, "fsdp's parts come over PCIe once, where ddp's come to each GPU"


def test_vllm_beside_a_base_on_the_host_is_found_where_it_can_be(folder_of: Callable[[str], Path]) -> None:
    folder, keys = folder_of("qwen2.5-7b"), ("parallel.param_offload=true", "rollout.engine=vllm")
    config = run_on(folder, *keys, "parallel.gpus=4")
    check_combination(config)
    settled, _ = settle(config, [H100] * 4)
    assert settled.parallel.strategy in ("fsdp", "fsdp2")
    assert settled.rollout.engine == "vllm"
    with pytest.raises(UserError, match=r"rollout\.engine=vllm reads the base on the device"):
        settle(run_on(folder, *keys, "parallel.gpus=3"), [H100] * 3)  # which cannot share 28 heads


def test_a_cpu_process_has_no_other_memory_to_put_anything_in(folder_of: Callable[[str], Path]) -> None:
    keys = ("parallel.gpus=2", "parallel.microbatch_tokens=2048")
    offloads = ("parallel.param_offload=true", "parallel.optimizer_offload=true", "model.activation_offload=true")
    plain, away = (
        settle(run_on(folder_of("qwen2.5-1.5b"), *keys, *more), [Device(None, 40 * GIB)] * 2)[1]
        for more in ((), offloads)
    )
    assert plain == away


def test_a_shard_size_that_is_asked_for_stays(folder_of: Callable[[str], Path]) -> None:
    config = run_on(folder_of("qwen2.5-72b"), "parallel.shard_size=4", "rollout.memory_fraction=0.1")
    settled, why = settle(config, [replace(H100, memory=140 * GIB)] * 8)
    assert settled.parallel.shard_size == 4
    assert settled.parallel.strategy != "ddp"
    assert "base over 4" in why


def test_adapters_that_need_whole_weights_keep_ddp(folder_of: Callable[[str], Path]) -> None:
    settled, _ = settle(run_on(folder_of("qwen2.5-72b"), "adapter.dora=true"), [H100] * 8)
    assert settled.parallel.strategy == "ddp"


def test_a_model_that_the_plan_does_not_know_runs_all_the_same(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("qwen2.5-1.5b")
    text = (folder / "config.json").read_text().replace('"qwen2"', '"qwen2_moe", "num_experts": 8')
    (folder / "config.json").write_text(text)
    settled, why = settle(run_on(folder), [H100] * 8)
    assert settled.parallel.strategy == "ddp"
    assert "ddp with torch, unplanned: model_type=qwen2_moe is a mixture of experts" in why
    settled, why = settle(run_on(folder, "rollout.engine=vllm"), [H100] * 8)
    assert settled.rollout.engine == "vllm", "an engine that was asked for is not exchanged"
    assert "ddp with vllm, unplanned" in why


def test_an_engine_of_one_rank_is_not_laid_over_many() -> None:
    engine = auto.engine_on(load(None, ["rollout.engine=torch", "parallel.gpus=4"]))
    assert engine(Layout("fsdp2", 4, 1)) == "torch"
    assert engine(Layout("fsdp2", 4, 4)) is None


def test_a_vllm_beside_the_trainers_parts_is_of_all_ranks_that_hold_them() -> None:
    engine = auto.engine_on(load(None, ["rollout.engine=vllm", "parallel.gpus=4"]))
    assert engine(Layout("fsdp2", 4, 4)) == engine(Layout("fsdp", 4, 4, offload=True)) == "vllm"
    assert engine(Layout("fsdp2", 4, 2)) is engine(Layout("fsdp2", 4, 1)) is None


def test_vllm_samples_no_float32_base_in_parts_on_gpus(folder_of: Callable[[str], Path]) -> None:
    config = load(None, ["rollout.engine=auto", "parallel.gpus=4", "model.dtype=float32"])
    gpus, processes = auto.engine_on(config), auto.engine_on(config, on_gpus=False)
    assert (gpus(Layout("ddp")), gpus(Layout("shared", 4, 4))) == ("vllm", None), "whole weights are folded"
    assert gpus(Layout("shared", 4)) == "torch"
    assert processes(Layout("shared", 4, 4)) == "vllm"
    keys = ("rollout.engine=vllm", "rollout.adapter_mode=adapter", "model.dtype=float32")
    nowhere = run_on(folder_of("qwen2.5-1.5b"), *keys)
    for refused in (lambda: settle(nowhere, [H100] * 8), lambda: auto.plannable(nowhere)):
        with pytest.raises(UserError, match=r"model\.dtype=float32.*rollout\.adapter_mode=fold"):
            refused()


def test_a_run_tells_what_was_chosen(forks: Forks, tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    argv = small_run(tmp_path, tiny_model, "trainer.total_steps=1", "parallel.gpus=2")
    done = forks.run(*argv, cwd=tmp_path)
    assert done.code == 0, done
    assert "parallel.strategy=auto: ddp, which takes " in done.out
    assert "2 ranks on CPU processes, each with the whole base" in done.out

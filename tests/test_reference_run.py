"""verl's 72B run, word for word but for paths, sizes and the CPU, in a small form of benchmarks/reference_run.py."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
VERL = json.loads((Path(__file__).parent / "data" / "verl_runs.json").read_text())
WORDS = VERL["reference: Qwen2.5-72B on 8 x 80 GB"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    import reference_run

    yield reference_run
    sys.path.remove(str(BENCHMARKS))


def test_the_reference_run_trains_on_two_processes(benchmark: ModuleType, tmp_path: Path) -> None:
    assert set(WORDS) <= set(benchmark.REFERENCE), "the run's words are verl's"
    added = {word.partition("=")[0] for word in benchmark.overrides(tmp_path, 8, 2)}
    assert not added & {word.partition("=")[0] for word in WORDS}, "on eight, what is added changes none of them"
    benchmark.prepare(tmp_path, prompts=8)

    done = benchmark.run(tmp_path, 2, 1, ["data.train_batch_size=8", "+lorl.trainer.eval_before=false"])

    assert done.returncode == 0, done.stdout + done.stderr
    assert "parallel.strategy=auto: ddp" in done.stdout
    assert "2 ranks on CPU processes" in done.stdout
    (step,) = benchmark.steps_of(tmp_path)
    assert 0 < step["rollout/mismatch"] < 1e-4
    assert step["policy/grad_norm"] > 0
    run = tmp_path / benchmark.RUN
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["rollout"]["n"], config["adapter"]["rank"], config["optim"]["lr"]) == (5, 32, 3e-5)
    adapter = load_file(run / "checkpoints/step-1/adapter/adapter_model.safetensors")
    assert len(adapter) == 2 * 7 * 4, "all linear layers of four"
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())

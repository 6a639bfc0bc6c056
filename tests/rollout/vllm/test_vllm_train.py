"""Whole training runs on vLLM's samples: those of the embedded engine, in every mode, with an engine that fails."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lorl.rewards.pool import RewardPool
from lorl.rollout.vllm import versions
from small_trainer import read_metrics, run, small_config
from vllm_engines import needs_vllm, save_model

pytest_plugins = ["trainer_fixtures"]
pytestmark = needs_vllm

STEPS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "llama")


def trained(model: Path, folder: Path, pool: RewardPool, name: str, *overrides: str) -> Path:
    """The run folder of a finished run."""
    config = small_config(
        model,
        folder,
        "model.device=cpu",
        "data.max_prompt_tokens=64",
        "rollout.memory_fraction=0.002",
        "rollout.max_concurrent=8",
        "rollout.rest=always",
        *overrides,
        name=name,
    )
    _, trainer = run(config, pool, steps=STEPS)
    trainer.workers.close()
    return trainer.folder.path


def rollouts(run_folder: Path, step: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_folder / f"rollouts/step-{step}.jsonl").read_text().splitlines()]


def texts(run_folder: Path) -> list[tuple[Any, ...]]:
    rows = [row for step in range(1, STEPS + 1) for row in rollouts(run_folder, step)]
    return sorted((row["step"], row["prompt"], row["sample"], row["completion"], row["reward"]) for row in rows)


@pytest.fixture(scope="module")
def embedded(model: Path, tmp_path_factory: pytest.TempPathFactory, pool: RewardPool) -> Path:
    return trained(model, tmp_path_factory.mktemp("torch"), pool, "torch", "rollout.engine=torch")


@pytest.mark.parametrize("mode", ["adapter", "fold", "auto"])
def test_a_run_on_vllm_is_the_run_on_the_embedded_engine(
    mode: str, model: Path, tmp_path: Path, pool: RewardPool, embedded: Path
) -> None:
    overrides = ["rollout.engine=vllm", f"rollout.adapter_mode={mode}"]
    run_folder = trained(model, tmp_path, pool, mode, *overrides)
    rows, expected = read_metrics(run_folder), read_metrics(embedded)
    assert len(rows) == STEPS
    assert texts(run_folder) == texts(embedded)
    for row, other in zip(rows, expected, strict=True):
        assert row["rollout/mismatch"] < 1e-4
        assert row["reward/mean"] == pytest.approx(other["reward/mean"])
        assert row["policy/grad_norm"] == pytest.approx(other["policy/grad_norm"], rel=1e-3)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every engine that is started runs out of memory in its step number 40, up to twice."""
    failures: list[int] = []
    adopt = versions.Inside.__init__

    def initialise(self: versions.Inside, engine: Any) -> None:
        adopt(self, engine)
        runner = self.runner
        execute, steps = runner.execute_model, iter(range(1, 10**9))

        def execute_model(*args: Any, **kwargs: Any) -> Any:
            if next(steps) == 40 and len(failures) < 2:
                failures.append(1)
                raise torch.OutOfMemoryError("CUDA out of memory")
            return execute(*args, **kwargs)

        runner.execute_model = execute_model

    monkeypatch.setattr(versions.Inside, "__init__", initialise)
    return failures


def test_a_run_whose_engine_fails_comes_to_the_same_end(
    failing: list[int], model: Path, tmp_path: Path, pool: RewardPool, embedded: Path
) -> None:
    run_folder = trained(model, tmp_path, pool, "failing", "rollout.engine=vllm", "rollout.adapter_mode=adapter")
    assert len(failing) == 2
    assert texts(run_folder) == texts(embedded)
    assert sum(row.get("rollout/engine_restarts", 0.0) for row in read_metrics(run_folder)) == 2


def test_a_publish_is_timed_with_its_proof_and_without(model: Path, tmp_path: Path, pool: RewardPool) -> None:
    run_folder = trained(model, tmp_path, pool, "timed", "rollout.engine=vllm", "rollout.adapter_mode=adapter")
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["time/publish_copy_s"] < row["time/publish_s"] for row in rows if row["step"])

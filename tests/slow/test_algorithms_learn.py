"""Each algorithm learns: SmolLM2-135M sorts three numbers, and its reward rises within a dozen steps.

A run takes two to three minutes on two cores; `pytest -m slow -k grpo` picks one.
"""

import io
import json
import random
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from lorl import settings
from lorl.setup import train
from lorl.tracking.console import Console

STEPS = 12
SHOTS = 3

RULE = """
import re

def compute_score(solution_str, ground_truth):
    well_formed = bool(re.fullmatch(r"\\[\\d+, \\d+, \\d+\\]", solution_str.strip()))
    right = solution_str.strip() == ground_truth
    return {"score": float(right), "right": float(right), "well_formed": float(well_formed)}
"""

ALGORITHMS: dict[str, list[str]] = {
    **{
        name: [f"algorithm.advantage={name}"]
        for name in (
            "grpo",
            "grpo_passk",
            "rloo",
            "remax",
            "reinforce_plus_plus",
            "reinforce_plus_plus_baseline",
            "opo",
            "optimal_token_baseline",
        )
    },
    "dr_grpo": ["algorithm.normalize_std=false", "algorithm.aggregation=seq-mean-token-sum-norm"],
    "gpg": ["algorithm.advantage=gpg", "algorithm.policy_loss=gpg"],
    "gdpo": ["algorithm.advantage=gdpo", "algorithm.reward_weights={right: 1.0, well_formed: 0.1}"],
    "ppo": ["algorithm.advantage=gae", "critic.lr=1e-3", "critic.epochs=2"],
    "dapo": ["algorithm.preset=dapo", "algorithm.max_refills=2"],
    "kl_in_reward": ["algorithm.kl_coef=0.001", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1"],
    "kl_in_loss": ["algorithm.kl_coef=0.001", "algorithm.kl_control=adaptive", "algorithm.kl_estimator=k3+"],
    **{
        # two updates a step, so that the ratio is not one
        name: [f"algorithm.policy_loss={name}", "algorithm.minibatch_prompts=8"]
        for name in (
            "ppo_clip",
            "reinforce",
            "gspo",
            "sapo",
            "cispo",
            "clip_cov",
            "kl_cov",
            "gmpo",
            "dppo_tv",
            "dppo_kl",
            "dro",
        )
    },
    "token_is": ["correction.preset=decoupled_token_is", "algorithm.minibatch_prompts=8"],
    "bypass_pg": ["correction.preset=bypass_pg_is"],
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions with worked examples before each, as turns; the base knows the format from them, not how to sort."""
    folder = tmp_path_factory.mktemp("task")
    draw = random.Random(0)

    def example() -> tuple[str, str]:
        numbers = draw.sample(range(10, 100), 3)
        return f"Sort ascending: {numbers}", str(sorted(numbers))

    rows: list[dict[str, Any]] = []
    for _ in range(1024):
        messages = []
        for question, answer in (example() for _ in range(SHOTS)):
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        question, answer = example()
        rows.append({"prompt": [*messages, {"role": "user", "content": question}], "answer": answer})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rule.py").write_text(RULE)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_reward_rises(name: str, smollm2: str, task: Path, tmp_path: Path) -> None:
    config = settings.load(
        None,
        [
            f"model.path={smollm2}",
            f"data.train='{task / 'train.jsonl'}'",
            "data.prompts_per_step=16",
            f"reward.path='{task / 'rule.py'}'",
            "rollout.n=8",
            "rollout.max_response_tokens=16",
            "optim.lr=5e-4",
            "optim.betas=[0.9, 0.95]",
            f"trainer.total_steps={STEPS}",
            "checkpoint.every_steps=null",
            f"run.dir='{tmp_path}'",
            "run.name=r",
            *ALGORITHMS[name],
        ],
    )
    assert train(config, Console(io.StringIO())) is not None
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward/mean"] for row in rows if row["step"]]
    assert len(rewards) == STEPS
    assert fmean(rewards[-3:]) > fmean(rewards[:3]), rewards

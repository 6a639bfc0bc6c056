"""Each algorithm's run on a small real task: SmolLM2-135M learns to sort three numbers.

`test_algorithms_learn.py` asks that the reward rises; `benchmarks/algorithm_curves.py` records the curves.
"""

import json
import random
from pathlib import Path
from typing import Any

STEPS = 12
SHOTS = 3

RULE = """
import re

def compute_score(solution_str, ground_truth):
    well_formed = bool(re.fullmatch(r"\\[\\d+, \\d+, \\d+\\]", solution_str.strip()))
    right = solution_str.strip() == ground_truth
    return {"score": float(right), "right": float(right), "well_formed": float(well_formed)}
"""

ADVANTAGES: dict[str, list[str]] = {
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
            "tir_optimal_token_baseline",
        )
    },
    "grpo_without_std": ["algorithm.normalize_std=false"],
    "dr_grpo": ["algorithm.normalize_std=false", "algorithm.aggregation=seq-mean-token-sum-norm"],
    "gpg": ["algorithm.advantage=gpg", "algorithm.policy_loss=gpg"],
    "gpg_verl": ["algorithm.advantage=gpg_verl", "algorithm.policy_loss=gpg", "algorithm.group_of_one=reward"],
    "gdpo": ["algorithm.advantage=gdpo", "algorithm.reward_weights={right: 1.0, well_formed: 0.1}"],
    "gdpo_verl": ["algorithm.advantage=gdpo_verl", "algorithm.reward_weights={right: 1.0, well_formed: 0.1}"],
    "ppo": ["algorithm.advantage=gae", "critic.lr=3e-4", "critic.epochs=2"],
    "dapo": ["algorithm.preset=dapo", "algorithm.max_refills=2"],
}

POLICY_LOSSES: dict[str, list[str]] = {
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
}

KL: dict[str, list[str]] = {
    # as in REINFORCE++'s paper; GRPO's division by the group's deviation would blow the KL up where rewards are equal
    "kl_k1_in_reward": [
        "algorithm.advantage=reinforce_plus_plus",
        "algorithm.kl_coef=0.001",
        "algorithm.kl_in=reward",
        "algorithm.kl_estimator=k1",
    ],
    "kl_k3_straight_adaptive": [
        "algorithm.kl_coef=0.001",
        "algorithm.kl_control=adaptive",
        "algorithm.kl_estimator=k3+",
    ],
    **{
        f"kl_{name}": ["algorithm.kl_coef=0.001", f"algorithm.kl_estimator={name}"]
        for name in ("k2", "k3", "low_var_kl", "abs", "full")
    },
    **{
        f"kl_{name}_straight": ["algorithm.kl_coef=0.001", f"algorithm.kl_estimator={name}+"]
        for name in ("k1", "abs", "low_var_kl")
    },
}

AGGREGATIONS: dict[str, list[str]] = {
    name: [f"algorithm.aggregation={name}"] for name in ("token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
}

CORRECTIONS: dict[str, list[str]] = {
    **{
        name: [f"correction.preset={name}", "algorithm.minibatch_prompts=8"]
        for name in (
            "decoupled_token_is",
            "decoupled_seq_is",
            "decoupled_token_icepop",
            "decoupled_seq_is_rs",
            "decoupled_geo_rs",
            "decoupled_k3_rs",
            "decoupled_geo_rs_seq_tis",
            "decoupled_geo_rs_token_tis",
            "decoupled_k3_rs_seq_tis",
            "decoupled_k3_rs_token_tis",
            "bypass_ppo_clip",
            "bypass_ppo_clip_geo_rs",
            "bypass_ppo_clip_k3_rs",
        )
    },
    **{
        name: [f"correction.preset={name}"]
        for name in (
            "bypass_pg_is",
            "bypass_pg_token_icepop",
            "bypass_pg_geo_rs",
            "bypass_pg_geo_rs_seq_tis",
            "bypass_pg_geo_rs_token_tis",
        )
    },
}

ALGORITHMS: dict[str, list[str]] = {**ADVANTAGES, **POLICY_LOSSES, **KL, **AGGREGATIONS, **CORRECTIONS}


def write_task(folder: Path) -> None:
    """`train.jsonl`: questions with worked examples before each, as turns, and `rule.py`. The base knows the format
    from the examples, not how to sort."""
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


def overrides(name: str, *, model: str, task: Path, runs: Path) -> list[str]:
    """The run of algorithm `name`: 16 prompts x 8 samples a step, in the folder `runs`/`name`."""
    return [
        f"model.path='{model}'",
        "model.dtype=float32",
        f"data.train='{task / 'train.jsonl'}'",
        "data.prompts_per_step=16",
        f"reward.path='{task / 'rule.py'}'",
        "rollout.n=8",
        "rollout.max_response_tokens=16",
        "optim.lr=5e-4",
        "optim.betas=[0.9, 0.95]",
        f"trainer.total_steps={STEPS}",
        "checkpoint.every_steps=null",
        f"run.dir='{runs}'",
        f"run.name='{name}'",
        *ALGORITHMS[name],
    ]


def rewards(run_folder: Path) -> list[float]:
    """Mean reward of each step."""
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return [row["reward/mean"] for row in rows if row["step"]]

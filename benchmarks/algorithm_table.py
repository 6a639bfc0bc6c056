"""Writes docs/algorithms.md and its picture: each algorithm's source, check, largest error and reward curve.

    python benchmarks/algorithm_table.py [--batches 500]

Errors are computed anew (`tests/algorithms`, float64, minutes); curves come from docs/data/algorithm_curves.json, which
`benchmarks/algorithm_curves.py` records.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from _svg import Line, Panel, grid

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "algorithms"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "slow"))

import learning_cases
from algorithm_checks import CHECKS, Errors, worst

from lorl.algorithms.catalogue import available

DOCS = Path(__file__).resolve().parents[1] / "docs"
HEADINGS = {
    "advantage": "Advantage estimators",
    "policy loss": "Policy losses",
    "KL estimator": "KL estimators",
    "aggregation": "Aggregation",
    "correction": "Rollout correction",
    "preset": "Presets",
    "value loss": "PPO's critic",
}
PALETTE = ("#2f86d6", "#e08a00", "#16a37f", "#c76aa5", "#8a6fd1", "#d9573a", "#8b95a1")
COLOURS = dict(zip(HEADINGS, PALETTE, strict=True))
GROUPS = (  # of learning_cases, for the picture
    ("advantage", learning_cases.ADVANTAGES),
    ("policy loss", learning_cases.POLICY_LOSSES),
    ("KL estimator", learning_cases.KL),
    ("aggregation", learning_cases.AGGREGATIONS),
    ("correction", learning_cases.CORRECTIONS),
)


HEAD = """\
# Algorithms

What `lorl algorithms` lists, and how it is known to be right. Written by `python benchmarks/algorithm_table.py`; change
that, not this.

**Checked against.** Each algorithm is compared in float64 with a second implementation, written from its paper as loops
over Python lists that share no code with lorl (`tests/algorithms/paper_*.py`); gradients come there from forward-mode
derivatives. The errors are the largest over BATCHES random ragged batches, with groups of one, equal rewards, fully
masked sequences and ungraded samples, and over all settings that are tried (`tests/algorithms/algorithm_checks.py`);
relative where the reference is above 1. Whitened advantages lose digits where the batch's variance is nearly zero: that
is where 1e-12 comes from.

**Reward.** What it does in training: SmolLM2-135M learns to sort three numbers, 16 prompts x 8 samples a step, 12
steps, float32, learning rate 5e-4, one seed (`tests/slow`). The column is the mean reward of the first three steps and
of the last three; a step's mean is over 128 samples, so a difference of 0.1 between two algorithms says little. Policy
losses and corrections take two updates a step. Curves, settings and machines are in
[`data/algorithm_curves.json`](data/algorithm_curves.json): an H100 with up to 12 runs at a time, or two shared cores.
"Steps seen" is what the time on that machine was not enough for; `python benchmarks/algorithm_curves.py NAME` runs one.

![reward curves](images/algorithm_curves.svg)

What was learned from them:

- A KL in the *reward* goes badly with GRPO's division by the group's deviation: where all answers of a group earn the
  same, the KL's small differences are all that is left, and the division blows them up to full size. With
  `algorithm.kl_in=reward algorithm.kl_coef=0.001` GRPO went from 0.17 to 0.22 in 11 steps (means of three), where it
  reached 0.44 without. From the second step on 62 to 100% of its groups had a gradient, where 6 to 69% have one
  without. Put the KL in the loss, or use `reinforce_plus_plus`, whose paper puts it in the reward.
- `grpo_passk` learns more slowly than most: only a group with one best answer moves it.
- The engine that samples here is the trainer's own, and its log-probabilities agree to 2e-6: the corrections' weights
  are 1 and nothing is rejected, so the decoupled presets' curves are that of `ppo_clip`. With bypass the current
  policy is compared with the engine's, and from the second update of a step on it has moved.
- `bypass_ppo_clip_k3_rs` did not learn here, and is the only one that got worse: the second update of step 1 left out
  38% of the tokens, those of the answers that had moved most, and by step 3 the policy was sure of one order
  (perplexity 1.007): groups of equal rewards, no gradient. A step that moves answers by more than the preset's 0.01 is
  too long for it."""


@dataclass(frozen=True, slots=True)
class Row:
    kind: str
    setting: str  # key=value, as one writes it
    source: str
    check: str  # the name in CHECKS
    case: str | None  # the name in learning_cases


def rows() -> list[Row]:
    """What `lorl algorithms` lists, and the variants that have no name of their own."""
    found = [
        Row(each.kind, f"{each.key}={each.name}", each.source, each.name, case_of(each.key, each.name))
        for each in available()
    ]
    dr_grpo = "Liu et al. 2025, arXiv 2503.20783"
    otb = "verl's multi-turn form: the same function on sampled tokens"
    extra = [
        Row("advantage", "algorithm.advantage=grpo algorithm.normalize_std=false", dr_grpo, "grpo", "grpo_without_std"),
        Row(
            "advantage",
            "algorithm.advantage=grpo algorithm.normalize_std=false algorithm.aggregation=seq-mean-token-sum-norm",
            f"Dr. GRPO, {dr_grpo}",
            "grpo",
            "dr_grpo",
        ),
        Row(
            "advantage",
            "algorithm.advantage=tir_optimal_token_baseline",
            otb,
            "optimal_token_baseline",
            "tir_optimal_token_baseline",
        ),
        Row("value loss", "critic.value_clip=0.5", "Engstrom et al. 2020, arXiv 2005.12729", "value_loss", "ppo"),
    ]
    return sorted(found + extra, key=lambda row: list(HEADINGS).index(row.kind))


def case_of(key: str, name: str) -> str | None:
    """The first learning case that sets `key` to `name`; GRPO's for a default."""
    defaults = ("algorithm.advantage=grpo", "algorithm.aggregation=token-mean", "correction.preset=disabled")
    for case, settings in learning_cases.ALGORITHMS.items():
        if f"{key}={name}" in settings:
            return case
    return "grpo" if f"{key}={name}" in defaults else None


def markdown(row: Row, found: Mapping[tuple[str, str], tuple[Errors, str]], curves: Mapping[str, Any]) -> str:
    errors, reference = found.get((row.kind, row.check), (None, "does nothing"))
    value = "" if errors is None else size(errors.value)
    gradient = "" if errors is None or errors.gradient is None else size(errors.gradient)
    return f"| `{row.setting}` | {row.source} | `{reference}` | {value} | {gradient} | {reward(row.case, curves)} |"


def size(error: float) -> str:
    return f"{error:.0e}" if error else "0"


def reward(case: str | None, curves: Mapping[str, Any]) -> str:
    rewards = curves[case]["rewards"] if case in curves else []
    if not rewards:
        return "not run"
    if len(rewards) < learning_cases.STEPS:
        return f"{len(rewards)} steps seen: {rewards[0]:.2f} to {rewards[-1]:.2f}"
    return f"{fmean(rewards[:3]):.2f} → {fmean(rewards[-3:]):.2f}"


def picture(curves: Mapping[str, Any]) -> str:
    panels = []
    for kind, cases in GROUPS:
        for case in cases:
            values = curves.get(case, {"rewards": []})["rewards"]
            if len(values) == learning_cases.STEPS:
                line = Line(range(1, len(values) + 1), values, COLOURS[kind])
                panels.append(Panel(case, [line]))
    legend = [(HEADINGS[kind], COLOURS[kind]) for kind, _ in GROUPS]
    return grid(panels, columns=6, size=(170, 100), last_step=learning_cases.STEPS, font=9, legend=legend)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=500, help="random batches for each check")
    batches = parser.parse_args().batches
    curves = json.loads((DOCS / "data" / "algorithm_curves.json").read_text())
    (DOCS / "images" / "algorithm_curves.svg").write_text(picture(curves))
    found: dict[tuple[str, str], tuple[Errors, str]] = {}
    for check in CHECKS:
        errors, key = worst(check, range(batches)), (check.kind, check.name)
        if key in found:
            errors = larger(errors, found[key][0])
        found[key] = errors, check.reference
    parts = [HEAD.replace("BATCHES", str(batches))]
    listed = rows()
    for kind, heading in HEADINGS.items():
        parts += ["", f"## {heading}", "", "| setting | source | checked against | value | gradient | reward |"]
        parts += ["| --- | --- | --- | --- | --- | --- |"]
        parts += [markdown(row, found, curves) for row in listed if row.kind == kind]
    (DOCS / "algorithms.md").write_text("\n".join(parts) + "\n")


def larger(a: Errors, b: Errors) -> Errors:
    gradients = [each.gradient for each in (a, b) if each.gradient is not None]
    return Errors(max(a.value, b.value), max(gradients) if gradients else None)


if __name__ == "__main__":
    main()

"""Trains the demo's task in two ways, three seeds each, and draws both: docs/data/NAME.json and docs/images/NAME.svg.

    python benchmarks/demo_curves.py ppo_grpo --train       GRPO beside PPO with its critic adapter
    python benchmarks/demo_curves.py engines --train        vLLM's samples beside the embedded engine's
    python benchmarks/demo_curves.py engines .demo/vllm-0   takes finished runs, named SIDE-SEED, and draws again

`make demo` leaves the data that examples/demo.yaml names. Runs that are taken replace the recorded ones of their names.
On a GPU: --at-a-time 6 --keys model.device=cuda model.dtype=bfloat16 rollout.memory_fraction=0.05. Short table last.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _svg import Line, Panel, grid

ROOT = Path(__file__).resolve().parents[1]
LORL = [sys.executable, "-c", "from lorl.cli import main; main()", "train", str(ROOT / "examples" / "demo.yaml")]


@dataclass(frozen=True)
class Side:
    title: str
    colour: str
    keys: tuple[str, ...] = ()


PICTURES: dict[str, dict[str, Side]] = {
    "ppo_grpo": {
        "grpo": Side("GRPO", "#2f86d6"),
        "ppo": Side(
            "PPO with its critic adapter",
            "#e08a00",
            ("algorithm.advantage=gae", "critic.lr=3e-4", "critic.epochs=2"),
        ),
    },
    "engines": {
        "vllm": Side("samples by vLLM", "#2f86d6", ("rollout.engine=vllm", "rollout.adapter_mode=adapter")),
        "torch": Side("by the embedded engine", "#e08a00", ("rollout.engine=torch",)),
    },
}


def train(sides: Mapping[str, Side], args: argparse.Namespace) -> list[Path]:
    """Folders of the runs that came to their end; a line for each that did not."""
    waiting = [(f"{name}-{seed}", side, seed) for seed in args.seeds for name, side in sides.items()]
    running: dict[Path, subprocess.Popen[bytes]] = {}
    ended: list[Path] = []
    args.folder.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        while waiting and len(running) < args.at_a_time:
            name, side, seed = waiting.pop(0)
            keys = [f"run.dir={args.folder}", f"run.name={name}", f"seed={seed}", "trainer.eval_every=10"]
            log = (args.folder / f"{name}.log").open("wb")
            running[args.folder / name] = subprocess.Popen(
                [*LORL, *keys, *side.keys, *args.keys], stdout=log, stderr=log
            )
        time.sleep(0.5)
        for run in [run for run, process in running.items() if process.poll() is not None]:
            if running.pop(run).returncode == 0:
                ended.append(run)
            else:
                print(
                    f"{run.name}: {(args.folder / f'{run.name}.log').read_text().strip().splitlines()[-1]}", flush=True
                )
    return ended


def read(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"]]
    found: dict[str, Any] = {
        "reward": [round(row["reward/mean"], 4) for row in steps],
        "accuracy": [[row["step"], round(row["eval/accuracy"], 4)] for row in rows if "eval/accuracy" in row],
        "s_per_step": round(sum(row["time/step_s"] for row in steps) / len(steps), 2),
        "accuracy_95": [round(steps[-1][f"eval/accuracy_{side}"], 3) for side in ("low", "high")],
        "mismatch": round(max(row.get("rollout/mismatch", 0.0) for row in steps), 5),
    }
    if "critic/explained_variance" in steps[-1]:
        found["explained_variance"] = [round(row["critic/explained_variance"], 3) for row in steps]
    return found


def draw(sides: Mapping[str, Side], runs: Mapping[str, dict[str, Any]]) -> str:
    accuracy, reward = [], []
    for name, run in runs.items():
        colour, xs = sides[name.split("-")[0]].colour, [step for step, _ in run["accuracy"]]
        accuracy.append(Line(xs, [value for _, value in run["accuracy"]], colour, marks=True))
        reward.append(Line(range(1, len(run["reward"]) + 1), run["reward"], colour))
    panels = [
        Panel("accuracy on 256 held-out problems", accuracy),
        Panel("mean reward of the training samples", reward),
    ]
    last = max(len(run["reward"]) for run in runs.values())
    seeds = " ".join(sorted({name.split("-")[1] for name in runs}))
    legend = [(f"{side.title}, seeds {seeds}" if not index else side.title, side.colour)
              for index, side in enumerate(sides.values())]  # fmt: skip
    return grid(panels, columns=2, size=(430, 280), last_step=last, font=13, legend=legend)


def table(runs: Mapping[str, dict[str, Any]]) -> Sequence[str]:
    return [f"{'run':10} accuracy after each evaluation (step: share); largest mismatch, s a step"] + [
        f"{name:10} {', '.join(f'{step}: {value:.3f}' for step, value in run['accuracy'])}; "
        f"{run.get('mismatch', float('nan')):.1e}, {run['s_per_step']}"
        for name, run in runs.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", choices=list(PICTURES))
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs named SIDE-SEED")
    parser.add_argument("--train", action="store_true", help="train them first")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--at-a-time", type=int, default=1, help="runs side by side")
    parser.add_argument("--folder", type=Path, default=Path(".demo"), help="for the runs that are trained")
    parser.add_argument("--keys", nargs="*", default=[], help="more key=value for every run that is trained")
    args = parser.parse_args()
    sides, data = PICTURES[args.picture], ROOT / "docs" / "data" / f"{args.picture}.json"
    folders = [*args.runs, *(train(sides, args) if args.train else [])]
    recorded = json.loads(data.read_text()) if data.exists() else {}
    runs = recorded | {folder.name: read(folder) for folder in folders}
    if not runs:
        sys.exit("there is no run to draw")
    data.write_text(
        "{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(runs.items())) + "\n}\n"
    )
    (ROOT / "docs" / "images" / f"{args.picture}.svg").write_text(draw(sides, runs))
    print(*table(runs), sep="\n")


if __name__ == "__main__":
    main()

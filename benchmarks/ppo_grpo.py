"""Draws docs/images/ppo_grpo.svg from docs/data/ppo_grpo.json: the demo's task by GRPO and by PPO, three seeds each.

    for s in 0 1 2; do
      lorl train examples/demo.yaml trainer.eval_every=10 seed=$s run.name=grpo-$s
      lorl train examples/demo.yaml trainer.eval_every=10 seed=$s run.name=ppo-$s \\
        algorithm.advantage=gae critic.lr=3e-4 critic.epochs=2
    done
    python benchmarks/ppo_grpo.py .demo/{grpo,ppo}-{0,1,2}

Run folders, where given, replace the recorded runs of their names.
"""

import argparse
import json
from pathlib import Path

from _svg import Line, Panel, grid

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATA = DOCS / "data" / "ppo_grpo.json"
COLOURS = {"grpo": "#2f86d6", "ppo": "#e08a00"}


def read(folder: Path) -> dict[str, object]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["step"]]
    found: dict[str, object] = {
        "reward": [round(row["reward/mean"], 4) for row in steps],
        "accuracy": [[row["step"], round(row["eval/accuracy"], 4)] for row in rows if "eval/accuracy" in row],
        "s_per_step": round(sum(row["time/step_s"] for row in steps) / len(steps), 2),
        "accuracy_95": [round(steps[-1][f"eval/accuracy_{side}"], 3) for side in ("low", "high")],
    }
    if "critic/explained_variance" in steps[-1]:
        found["explained_variance"] = [round(row["critic/explained_variance"], 3) for row in steps]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="run folders named ALGORITHM-SEED")
    runs = json.loads(DATA.read_text()) | {folder.name: read(folder) for folder in parser.parse_args().runs}
    DATA.write_text("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in runs.items()) + "\n}\n")

    accuracy, reward = [], []
    for name, run in runs.items():
        colour, xs = COLOURS[name.split("-")[0]], [step for step, _ in run["accuracy"]]
        accuracy.append(Line(xs, [value for _, value in run["accuracy"]], colour, marks=True))
        reward.append(Line(range(1, len(run["reward"]) + 1), run["reward"], colour))
    panels = [
        Panel("accuracy on 256 held-out problems", accuracy),
        Panel("mean reward of the training samples", reward),
    ]
    last = max(len(run["reward"]) for run in runs.values())
    legend = [("GRPO, seeds 0 1 2", COLOURS["grpo"]), ("PPO with its critic adapter", COLOURS["ppo"])]
    svg = grid(panels, columns=2, size=(430, 280), last_step=last, font=13, legend=legend)
    (DOCS / "images" / "ppo_grpo.svg").write_text(svg)


if __name__ == "__main__":
    main()

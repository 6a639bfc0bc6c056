"""Records each algorithm's reward curve in docs/data/algorithm_curves.json, on the task of `tests/slow`.

    python benchmarks/algorithm_curves.py [--model smollm2-135m] [--where "2 cores"] [--at-a-time 1] [NAME|KEY=VALUE]...

Names are those of `tests/slow/learning_cases.py`; without one, all run. A curve that is there already is replaced.
`benchmarks/algorithm_table.py` then makes the table and the picture of docs/algorithms.md.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "slow"))

import learning_cases

DATA = Path(__file__).resolve().parents[1] / "docs" / "data" / "algorithm_curves.json"
LORL = [sys.executable, "-c", "from lorl.cli import main; main()", "train"]


def save(curves: dict[str, dict[str, object]]) -> None:
    """A curve a line, in the cases' order."""
    lines = [
        f"  {json.dumps(name)}: {json.dumps(curves[name])}" for name in learning_cases.ALGORITHMS if name in curves
    ]
    DATA.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="names of cases, and overrides for all of them")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--where", default=platform.processor() or platform.machine(), help="the machine, for people")
    parser.add_argument("--at-a-time", type=int, default=1, help="runs side by side")
    arguments = parser.parse_args()
    waiting = [word for word in arguments.words if "=" not in word] or list(learning_cases.ALGORITHMS)
    more = [word for word in arguments.words if "=" in word]
    running: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        learning_cases.write_task(folder)
        while waiting or running:
            while waiting and len(running) < arguments.at_a_time:
                name = waiting.pop(0)
                overrides = learning_cases.overrides(name, model=arguments.model, task=folder, runs=folder)
                log = (folder / f"{name}.log").open("wb")
                running[name] = subprocess.Popen([*LORL, *overrides, *more], stdout=log, stderr=log)
            time.sleep(0.5)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if running.pop(name).returncode:
                    print(f"{name} failed: {(folder / f'{name}.log').read_text()[-500:]}")
                    continue
                rewards = [round(reward, 4) for reward in learning_cases.rewards(folder / name)]
                curve = {"settings": learning_cases.ALGORITHMS[name] + more, "where": arguments.where}
                save(json.loads(DATA.read_text()) | {name: {**curve, "rewards": rewards}})
                print(name, *rewards)


if __name__ == "__main__":
    main()

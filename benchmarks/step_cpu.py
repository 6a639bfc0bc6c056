"""Seconds and memory of one GRPO step on the CPU: lorl beside TRL, on token-identical work.

    python benchmarks/step_cpu.py --trl-python /path/to/trl-venv/bin/python

Each side runs in a fresh process with the same threads, one after the other (A B A B with `--repeats 2`). README.md
says what is held equal. Any side that sees other lengths than asked for ends the comparison.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from _step_case import PROMPT_TOKENS, PROMPTS_PER_STEP, RESPONSE_TOKENS, SAMPLES

HERE = Path(__file__).parent
DEFAULT_MODEL = Path.home() / ".cache/lorl/models/smollm2-135m"
WARM_UP_STEPS = 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one warm-up step (default 3)")
    parser.add_argument("--repeats", type=int, default=1, help="fresh processes of each side (default 1)")
    parser.add_argument("--case", choices=[*PROMPT_TOKENS, "both"], default="both")
    parser.add_argument("--side", choices=["lorl", "trl", "both"], default="both")
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL (default: this one)")
    parser.add_argument(
        "--model", type=Path, default=DEFAULT_MODEL, help=f"safetensors folder (default {DEFAULT_MODEL})"
    )
    parser.add_argument(
        "--trl-micro-batch", type=int, default=16, help="completions in one of TRL's passes (default 16: all at once)"
    )
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    if chosen.steps < 1 or chosen.repeats < 1:
        parser.error("--steps and --repeats are at least 1")
    if not (chosen.model / "config.json").is_file():
        parser.error(f"no model in {chosen.model}: fetch SmolLM2-135M-Instruct or name its folder with --model")
    return chosen


def run_side(python: str, script: str, case: str, chosen: argparse.Namespace) -> dict:
    """One side in a fresh process; the JSON line that it printed last."""
    command = [python, str(HERE / script), str(chosen.model), case, str(chosen.steps + WARM_UP_STEPS)]
    command.append(str(chosen.trl_micro_batch))
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(chosen.threads)}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    result = json.loads(done.stdout.splitlines()[-1])
    expected = {"prompt_tokens": [PROMPT_TOKENS[case]], "response_tokens": [RESPONSE_TOKENS]}
    seen = {key: result[key] for key in expected}
    if seen != expected or len(result["seconds"]) != chosen.steps + WARM_UP_STEPS:
        sys.exit(f"{script}, case {case}: not the work that was asked for: {seen}, {len(result['seconds'])} steps")
    print(f"  {script} {case}: " + " ".join(f"{second:.2f}" for second in result["seconds"]) + " s", flush=True)
    return result


def main() -> None:
    chosen = arguments()
    sides = {"lorl": (sys.executable, "_lorl_side.py"), "trl": (chosen.trl_python, "_trl_side.py")}
    if chosen.side != "both":
        sides = {chosen.side: sides[chosen.side]}
    cases = list(PROMPT_TOKENS) if chosen.case == "both" else [chosen.case]

    print(f"{PROMPTS_PER_STEP} prompts x {SAMPLES} samples, {RESPONSE_TOKENS} new tokens, {chosen.threads} threads; "
          "the first step of each process is warm-up")  # fmt: skip
    runs: dict[tuple[str, str], list[dict]] = {}
    for case in cases:
        for _ in range(chosen.repeats):
            for side, (python, script) in sides.items():
                runs.setdefault((case, side), []).append(run_side(python, script, case, chosen))

    print(f"\n{'case':<6} {'side':<5} {'s/step':>8} {'peak GiB':>9}")
    for case in cases:
        step_s, peak_gib = {}, {}
        for side in sides:
            of_side = runs[case, side]
            step_s[side] = statistics.median(s for run in of_side for s in run["seconds"][WARM_UP_STEPS:])
            peak_gib[side] = max(run["peak_gib"] for run in of_side)
            print(f"{case:<6} {side:<5} {step_s[side]:>8.2f} {peak_gib[side]:>9.2f}")
        if len(sides) == 2:
            speed, memory = step_s["trl"] / step_s["lorl"], peak_gib["trl"] / peak_gib["lorl"]
            print(f"{case:<6} {'TRL / lorl':<5}{speed:>4.1f}x time, {memory:.1f}x memory")


if __name__ == "__main__":
    main()

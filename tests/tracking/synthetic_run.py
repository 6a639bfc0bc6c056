"""A run folder made up to look like a demo run: what the report's tests, and whoever changes its looks, read."""

import json
import math
import random
from pathlib import Path

import yaml

from lorl.config import RunConfig
from lorl.statistics import wilson_interval

STATUSES = ("timeout", "raised", "memory")


def make_run_folder(folder: Path, steps: int = 40, finished: bool = True, recurring: bool = True) -> Path:
    """Write config.yaml, environment.json, metrics.jsonl, rollouts/ and, if `finished`, summary.json."""
    rng = random.Random(0)
    (folder / "rollouts").mkdir(parents=True)
    config = RunConfig().model_dump(mode="json")
    config["data"]["train"] = "reasoning_gym:number_sorting"
    config["trainer"]["total_steps"] = 40
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    environment = {
        "machine": "x86_64, 2 CPUs, 23.5 GiB of memory",
        "packages": {"torch": "2.13.0", "transformers": "5.19.0", "peft": "0.21.2"},
        "git": {"commit": "0123abc", "dirty": False},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = [_metrics(step, rng) for step in range(steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(1, steps + 1):
        samples = _samples(step, rng, recurring)
        text = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / "rollouts" / f"step-{step}.jsonl").write_text(text)
    if finished:
        summary = {
            "before": _side(70),
            "after": _side(246),
            "steps": steps,
            "seconds": 441.3,
            "rollout_tokens": 61_440,
            "trained_tokens": 58_112,
            "run": folder.name,
            "model": "smollm2-135m",
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def skill(step: int) -> float:
    return 0.27 + 0.7 / (1 + math.exp(-(step - 12) / 4))


def _side(right: int) -> dict:
    low, high = wilson_interval(right, 256)
    return {"accuracy": right / 256, "low": low, "high": high, "n": 256, "well_formed": 0.9 + right / 2560}


def _metrics(step: int, rng: random.Random) -> dict:
    row: dict = {"step": step}
    if step % 5 == 0:
        right = round(256 * skill(step))
        low, high = wilson_interval(right, 256)
        row |= {"eval/accuracy": right / 256, "eval/accuracy_low": low, "eval/accuracy_high": high, "eval/n": 256}
        row["eval/well_formed"] = min(1.0, 0.9 + step / 300)
    if step == 0:
        return row
    noise = lambda scale: rng.gauss(0, scale)  # noqa: E731
    parts = {"time/rollout_s": 5.5 + noise(0.3), "time/estimate_s": 0.2, "time/update_s": 3.4 + noise(0.2)}
    return (
        row
        | parts
        | {
            "reward/mean": skill(step) + noise(0.04),
            "reward/std": 0.42 - skill(step) / 3,
            "reward/ok_fraction": 1 - 0.02 * (step % 7 == 0),
            "reward/format": min(1.0, 0.9 + step / 300),
            "loss/policy": noise(0.01),
            "policy/kl": 0.002 * step + abs(noise(0.003)),
            "policy/entropy": 0.5 * math.exp(-step / 20) + 0.05,
            "policy/clip_fraction": abs(noise(0.01)),
            "policy/grad_norm": None if step == 9 else 0.4 + abs(noise(0.2)),
            "policy/lr": 5e-4,
            "rollout/mismatch": 10 ** (-5.5 + noise(0.2)),
            "rollout/response_tokens_mean": 11 + noise(0.5),
            "rollout/truncated_fraction": max(0.0, 0.1 - step / 100),
            "time/step_s": sum(parts.values()) + 0.4,
            "throughput/rollout_tokens_per_s": 260 + noise(15),
            "throughput/train_tokens_per_s": 420 + noise(20),
            "memory/peak_gib": 2.2,
            "memory/rss_gib": 2.4 + step / 400,
        }
    )


def _samples(step: int, rng: random.Random, recurring: bool) -> list[dict]:
    samples = []
    for prompt in range(4):
        prompt_id = f"train-{prompt if recurring and prompt < 2 else 100 * step + prompt}"
        numbers = random.Random(prompt_id).sample(range(10, 100), 3)
        answer = sorted(numbers)
        for sample in range(8):
            right = rng.random() < skill(step)
            status = STATUSES[sample % 3] if rng.random() < 0.01 else "ok"
            samples.append(
                {
                    "step": step,
                    "prompt_id": prompt_id,
                    "prompt": f"Sort these numbers in ascending order: {numbers}",
                    "sample": sample,
                    "completion": str(answer if right else numbers),
                    "reward": float(right) if status == "ok" else None,
                    "status": status,
                    "finish": "length" if rng.random() < 0.05 else "stop",
                    "tokens": 11,
                    "extras": {"format": 1.0},
                    "ground_truth": str(answer),
                }
            )
    return samples

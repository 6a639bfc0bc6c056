"""Bytes that ranks send each other in a step, measured at the loopback device, beside the formula.

    PYTHONPATH=src python benchmarks/traffic.py [RANKS:STRATEGY[:SHARD_SIZE] ...]

Ranks are CPU processes over gloo, without Ray, whose own messages would count; the model is a random Llama of 4 layers.
Everything else on the loopback device counts too: run it on a quiet machine.
"""

import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import torch

TESTS = Path(__file__).resolve().parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "parallel")]

from forked import ForkedRanks  # noqa: E402

import small_trainer  # noqa: E402
from conftest import save_tiny_model  # noqa: E402
from lorl.config import RewardConfig  # noqa: E402
from lorl.policy.load import TRAINED, load_policy  # noqa: E402
from lorl.rewards.pool import RewardPool  # noqa: E402

CASES = ("2:ddp", "3:ddp", "2:fsdp", "2:fsdp2", "3:fsdp2", "4:fsdp2:2")
RESPONSE_TOKENS = 10
STEPS = 3


def main() -> None:
    torch.set_num_threads(1)
    print("ranks  strategy   phase        measured, MB  formula, MB")
    for case in sys.argv[1:] or CASES:
        ranks, strategy, size = (case + ":").split(":")[:3]
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            measured, formula = measure(int(ranks), strategy, int(size) if size else None, Path(folder), stack)
        name = f"{strategy}/{size}" if size else strategy
        for phase, expected in formula.items():
            print(f"{ranks:>5}  {name:9}  {phase:11}  {measured[phase] / 1e6:12.2f}  {expected / 1e6:11.2f}")


def measure(
    ranks: int, strategy: str, shard_size: int | None, folder: Path, stack: ExitStack
) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes that all ranks sent in each phase of a step, the least of STEPS, and what they should have sent."""
    (folder / "rule.py").write_text(small_trainer.RULE)
    model = save_tiny_model(folder / "model", hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    pool = stack.enter_context(RewardPool(RewardConfig(path=str(folder / "rule.py"), workers=1)))
    keys = ["adapter.rank=32", "algorithm.kl_coef=0.05", f"rollout.max_response_tokens={RESPONSE_TOKENS}"]
    spread = [f"parallel.gpus={ranks}", f"parallel.strategy={strategy}"]
    if shard_size:
        spread.append(f"parallel.shard_size={shard_size}")
    config = small_trainer.small_config(model, folder, *keys, "rollout.ignore_eos=true", *spread)
    small_trainer.local_worker = lambda config, *_: ForkedRanks(config)
    trainer = small_trainer.make_trainer(config, pool, stack, steps=STEPS)
    workers: Any = trainer.workers
    stack.callback(workers.close)
    sent: dict[str, list[int]] = {}
    for phase in ("generate", "logprobs", "update"):
        setattr(workers, phase, counted(getattr(workers, phase), sent.setdefault(phase, [])))
    workers.publish()
    for _ in range(STEPS):
        trainer._step()

    policy = load_policy(config.model, config.adapter, seed=0)
    adapter = sum(parameter.nbytes for parameter in policy.parameters(TRAINED).values())
    layers = sum(tensor.nbytes for name, tensor in policy.base_tensors().items() if ".layers." in name)
    whole = shard_size or ranks
    gather = ranks // whole * (whole - 1) * layers if strategy != "ddp" else 0
    formula = {
        "generate": RESPONSE_TOKENS * gather,
        "logprobs": gather,
        "update": 2 * (ranks - 1) * adapter + 2 * gather,
    }
    return {phase: min(found) for phase, found in sent.items()}, formula


def counted(call: Callable[..., Any], sent: list[int]) -> Callable[..., Any]:
    """`call`, with what the loopback device sends meanwhile added to `sent`. Generators are run to their end."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _sent()
        found = call(*args, **kwargs)
        generator = hasattr(found, "send")
        found = list(found) if generator else found
        sent.append(_sent() - before)
        return (item for item in found) if generator else found

    return run


def _sent() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


if __name__ == "__main__":
    main()

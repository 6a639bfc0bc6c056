"""Bytes that ranks send each other in a step, measured at the loopback device, beside the plan's formula.

    PYTHONPATH=src python benchmarks/traffic.py [RANKS:STRATEGY[:KEY=VALUE] ...]

KEY is one of parallel.*. Ranks are CPU processes over gloo, without Ray, whose own messages would count; the model is a
random Llama of 4 layers. Everything else on the loopback device counts too: run it on a quiet machine, or as root in a
network of its own: `unshare -n sh -c 'ip link set lo up; PYTHONPATH=src python benchmarks/traffic.py'`.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
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
from lorl.config import RewardConfig, RunConfig  # noqa: E402
from lorl.experience import Experience  # noqa: E402
from lorl.plan import traffic  # noqa: E402
from lorl.plan.demand import demand_of  # noqa: E402
from lorl.plan.footprint import GRADIENT_BYTES  # noqa: E402
from lorl.plan.layout import Layout  # noqa: E402
from lorl.rewards.pool import RewardPool  # noqa: E402

CASES = (
    "2:ddp",
    "3:ddp",
    "2:fsdp",
    "2:fsdp2",
    "3:fsdp2",
    "4:fsdp2:shard_size=2",
    "2:shared",
    "3:shared",
    "2:ddp:sequence=2",
)
RESPONSE_TOKENS = 10
STEPS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", default=CASES, metavar="RANKS:STRATEGY[:KEY=VALUE]")
    cases = parser.parse_args().cases
    torch.set_num_threads(1)
    print("ranks  strategy             phase        measured, MB  formula, MB")
    for case in cases:
        ranks, strategy, *keys = case.split(":")
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            for phase, measured, expected in measure(int(ranks), strategy, keys, Path(folder), stack):
                name = ", ".join([strategy, *keys])
                print(f"{ranks:>5}  {name:19}  {phase:11}  {measured / 1e6:12.2f}  {expected / 1e6:11.2f}")


def measure(
    ranks: int, strategy: str, keys: list[str], folder: Path, stack: ExitStack
) -> Iterator[tuple[str, int, float]]:
    """Each phase with the bytes that all ranks sent in it, the least of STEPS, and what they should have sent."""
    (folder / "rule.py").write_text(small_trainer.RULE)
    model = save_tiny_model(folder / "model", hidden_size=256, intermediate_size=704, num_hidden_layers=4)
    pool = stack.enter_context(RewardPool(RewardConfig(path=str(folder / "rule.py"), workers=1)))
    run = ["adapter.rank=32", "algorithm.kl_coef=0.05", f"rollout.max_response_tokens={RESPONSE_TOKENS}"]
    run += ["rollout.ignore_eos=true", "rollout.engine=torch", "model.dtype=float32"]
    spread = [f"parallel.{key}" for key in (f"gpus={ranks}", f"strategy={strategy}", *keys)]
    config = small_trainer.small_config(model, folder, *run, *spread)
    small_trainer.local_worker = lambda config, *_: ForkedRanks(config)
    trainer = small_trainer.make_trainer(config, pool, stack, steps=STEPS)
    workers: Any = trainer.workers
    stack.callback(workers.close)
    sent: dict[str, list[tuple[int, Any]]] = {}
    for phase in ("generate", "logprobs", "update"):
        setattr(workers, phase, counted(getattr(workers, phase), sent.setdefault(phase, [])))
    workers.publish()
    for _ in range(STEPS):
        trainer._step()
    for phase, calls in sent.items():
        measured, argument = min(calls, key=lambda call: call[0])
        yield phase, measured, formula(config, phase, argument)


def formula(config: RunConfig, phase: str, argument: Any) -> float:
    """What all ranks should send in `phase`, which was given `argument`: requests, or a batch."""
    demand, _ = demand_of(config)
    strategy, ranks = config.parallel.strategy, config.parallel.gpus
    assert strategy not in ("auto", "local")
    layout = Layout(strategy, 1 if strategy == "ddp" else config.parallel.shard_size or ranks)

    def gathered(*, gradient: bool) -> float:
        return ranks * traffic.gathered_bytes(demand.shape, demand.itemsize, layout, gradient=gradient)

    if phase == "generate":
        return RESPONSE_TOKENS * gathered(gradient=False)
    assert isinstance(argument, Experience)
    learns = phase == "update"
    tokens, how = len(argument.forest.tokens), {"gradient": learns, "recompute": False}
    passed = traffic.exchanged_bytes(demand.shape, demand.itemsize, tokens, demand.sequence, **how)
    reduced = traffic.reduced_bytes(demand.lora.parameters * GRADIENT_BYTES, ranks) if learns else 0.0
    return gathered(gradient=learns) + ranks * (passed + reduced)


def counted(call: Callable[..., Any], sent: list[tuple[int, Any]]) -> Callable[..., Any]:
    """`call`, with what the loopback device sends meanwhile, and the first argument, added to `sent`. Generators are
    run to their end."""

    def run(*args: Any, **kwargs: Any) -> Any:
        before = _sent()
        found = call(*args, **kwargs)
        generator = hasattr(found, "send")
        found = list(found) if generator else found
        sent.append((_sent() - before, args[0]))
        return (item for item in found) if generator else found

    return run


def _sent() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


if __name__ == "__main__":
    main()

"""Adapters whole on every rank, as lorl keeps them, beside adapters sharded by FSDP2: bytes held, bytes on the wire.

    PYTHONPATH=src python benchmarks/adapter_sharding.py

Two ranks are CPU processes over gloo; the model is a random Llama of 4 layers. Everything else on the loopback device
counts too: run it on a quiet machine.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.experience import Forest
from lorl.parallel.group import Ranks
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy

RANKS, LAYERS, RANK, TOKENS, STEPS = 2, 4, 32, 64, 3
MICRO_BATCHES = (1, 4)


@dataclass
class Found:
    held: int  # bytes a rank: masters, gradients, optimizer
    sent: dict[int, int]  # bytes of all ranks in an optimizer step, by micro-batches
    published: int  # bytes that a publish has besides, gathered whole
    published_by_layer: int  # the same, a layer at a time
    weights: Tensor  # the adapter after all steps


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny_model(
            Path(folder) / "model", hidden_size=256, intermediate_size=704, num_hidden_layers=LAYERS
        )
        whole, sharded = run(model, replicated), run(model, sharded_policy)
    adapter = whole.weights.nbytes
    print(f"an adapter of {adapter / 1e6:.2f} MB, {RANKS} ranks; MB")
    print(f"{'':48}{'whole':>8}{'sharded':>9}")
    rows: list[tuple[str, int, int]] = [("held a rank: masters, gradients, optimizer", whole.held, sharded.held)]
    for count in MICRO_BATCHES:
        rows.append((f"sent in an optimizer step of {count} micro-batches", whole.sent[count], sharded.sent[count]))
    rows.append(("more at the peak of a publish, gathered whole", whole.published, sharded.published))
    rows.append(("the same, gathered by layer", whole.published_by_layer, sharded.published_by_layer))
    for name, ours, theirs in rows:
        print(f"{name:48}{ours / 1e6:8.2f}{theirs / 1e6:9.2f}")
    print(f"largest difference of the two adapters: {float((whole.weights - sharded.weights).abs().max()):.1e}")


def replicated(policy: Policy, group: Ranks) -> Callable[[], None]:
    """lorl's way: one all-reduce, however many micro-batches. Returns what sums the gradients."""
    parameters = list(policy.parameters(TRAINED).values())
    return lambda: (group.sum_gradients(parameters, 0.0, "gradients"), None)[1]


def sharded_policy(policy: Policy, group: Ranks) -> Callable[[], None]:
    """FSDP2 over the adapter of each layer; it gathers in every pass and reduces in every backward pass."""
    base: Any = policy.peft.get_base_model()
    mesh = init_device_mesh("cpu", (group.size,), mesh_dim_names=("fsdp",))
    frozen = {parameter for parameter in base.parameters() if not parameter.requires_grad}
    for layer in base.base_model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=frozen)
    fully_shard(base.base_model, mesh=mesh, ignored_params=frozen)
    return lambda: None


def run(model: Path, strategy: Callable[[Policy, Ranks], Callable[[], None]]) -> Found:
    """What rank 0 finds."""
    context = get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (model, Path(folder) / "store", strategy, theirs)
        processes = [context.Process(target=work, args=(rank, *arguments)) for rank in range(RANKS)]
        for process in processes:
            process.start()
        theirs.close()
        found = ours.recv()
        for process in processes:
            process.join()
    return Found(*found[:-1], weights=torch.tensor(found[-1]))


def work(rank: int, model: Path, store: Path, strategy: Callable[..., Any], pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    shared = dist.FileStore(str(store), RANKS)
    dist.init_process_group("gloo", store=dist.PrefixStore("torch", shared), rank=rank, world_size=RANKS)
    policy = load_policy(ModelConfig(path=str(model)), AdapterConfig(rank=RANK), seed=0)
    policy.select(TRAINED)  # whose parameters then are the only ones that require gradients
    reduce = strategy(policy, Ranks(shared, 60.0))
    base: Any = policy.peft.get_base_model()
    parameters = {name: value for name, value in base.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    sent: dict[int, int] = {}
    for count in MICRO_BATCHES:
        found = []
        for _ in range(STEPS):
            dist.barrier()
            before = _sent()
            for index in range(count):
                backward(policy, rank * count + index)
            reduce()
            dist.barrier()
            found.append(_sent() - before)
            optimizer.step()
            held = bytes_of([*parameters.values(), *gradients(parameters.values()), *states(optimizer)])
            optimizer.zero_grad()
        sent[count] = min(found)
    by_layer: dict[str, int] = {}
    for name, value in parameters.items():
        if isinstance(value, DTensor):
            layer = name.partition(".layers.")[2].partition(".")[0]
            by_layer[layer] = by_layer.get(layer, 0) + value.full_tensor().nbytes
    weights = torch.cat([full(parameters[name]).flatten() for name in sorted(parameters)])
    if rank == 0:
        pipe.send((held, sent, sum(by_layer.values()), max(by_layer.values(), default=0), weights.tolist()))
    dist.barrier()
    os._exit(0)


def backward(policy: Policy, seed: int) -> None:
    """A micro-batch of one sequence. Both strategies come to the sum of the ranks' gradients: FSDP2 takes the mean."""
    tokens = torch.randint(2, 258, (TOKENS,), generator=torch.Generator().manual_seed(seed))
    order = torch.arange(TOKENS)
    segments, parent = torch.tensor([0, TOKENS], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    forest = Forest(tokens, order, segments, parent, previous=order - 1, sampled=order[8:])
    loss = -policy.logprobs(forest, adapter=TRAINED).logprobs.sum()
    sharded = isinstance(next(p for p in policy.peft.parameters() if p.requires_grad), DTensor)
    (loss * RANKS if sharded else loss).backward()


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def states(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _sent() -> int:
    return psutil.net_io_counters(pernic=True)["lo"].bytes_sent


if __name__ == "__main__":
    main()

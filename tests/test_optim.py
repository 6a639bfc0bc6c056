"""The learning-rate schedule, and optimizer state that goes to disk and back without changing a step."""

import pytest
import torch

from lorl.config import OptimConfig
from lorl.errors import UserError
from lorl.optim import learning_rate, load_optimizer_tensors, make_optimizer, optimizer_tensors


def rates(**fields: object) -> list[float]:
    config = OptimConfig(lr=1.0, **fields)  # type: ignore[arg-type]
    return [round(learning_rate(step, 6, config), 4) for step in range(1, 7)]


def test_schedules() -> None:
    assert rates() == [1.0] * 6
    assert rates(warmup_steps=2) == [0.3333, 0.6667, 1.0, 1.0, 1.0, 1.0]
    assert rates(schedule="linear") == [1.0, 0.8333, 0.6667, 0.5, 0.3333, 0.1667]
    assert rates(schedule="linear", warmup_steps=2, min_lr_ratio=0.5) == [0.3333, 0.6667, 1.0, 0.875, 0.75, 0.625]
    assert rates(schedule="cosine") == [1.0, 0.933, 0.75, 0.5, 0.25, 0.067]


def test_optimizer_state_survives_the_trip() -> None:
    def parameters() -> dict[str, torch.nn.Parameter]:
        torch.manual_seed(0)
        return {"a": torch.nn.Parameter(torch.randn(3, 4)), "b": torch.nn.Parameter(torch.randn(5))}

    def step(params: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in params.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    whole = parameters()
    optimizer = make_optimizer(whole, OptimConfig(lr=0.1, weight_decay=0.01))
    step(whole, optimizer, 1)
    saved = optimizer_tensors(optimizer, list(whole))
    values = {name: parameter.detach().clone() for name, parameter in whole.items()}
    step(whole, optimizer, 2)

    resumed = {name: torch.nn.Parameter(value) for name, value in values.items()}
    other = make_optimizer(resumed, OptimConfig(lr=0.1, weight_decay=0.01))
    load_optimizer_tensors(other, list(resumed), saved)
    step(resumed, other, 2)
    for name in whole:
        assert torch.equal(whole[name], resumed[name])

    with pytest.raises(UserError, match="does not fit"):
        load_optimizer_tensors(other, ["a", "c"], saved)


def test_a_hosted_optimizer_takes_the_same_steps_and_keeps_its_checkpoints() -> None:
    def stepped(hosted: bool) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.Tensor]]:
        params = {"a": torch.nn.Parameter(torch.ones(3, 4)), "b": torch.nn.Parameter(torch.ones(5))}
        optimizer = make_optimizer(params, OptimConfig(lr=0.1, weight_decay=0.01), hosted=hosted)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            for parameter in params.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
            if seed == 1:
                load_optimizer_tensors(optimizer, list(params), optimizer_tensors(optimizer, list(params)))
        return params, optimizer_tensors(optimizer, list(params))

    (ours, our_state), (theirs, their_state) = stepped(True), stepped(False)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)
    assert our_state.keys() == their_state.keys()
    assert all(torch.equal(value, their_state[name]) for name, value in our_state.items())

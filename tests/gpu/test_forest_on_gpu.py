"""The packed path on a CUDA device: the same numbers as sequences run alone, shared prompts and not, in both dtypes."""

from pathlib import Path

import pytest
import torch

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.experience import Completion, Outcome, Prompt
from lorl.packing import pack
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.torch_engine import TorchEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUND = {"float32": 2e-4, "bfloat16": 6e-2}


def build(folder: Path, dtype: str) -> Policy:
    save_tiny_model(folder, hidden_size=256, intermediate_size=512, num_attention_heads=4, initializer_range=0.05)
    config = ModelConfig(path=str(folder), dtype=dtype, device="cuda")  # type: ignore[arg-type]
    policy = load_policy(config, AdapterConfig(rank=8, alpha=16.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.data.copy_((torch.randn(parameter.shape, generator=generator) * 0.02).cuda())
    return policy


def batch(prefix: int) -> list[Completion]:
    generator = torch.Generator().manual_seed(2)
    draw = lambda count: torch.randint(2, 258, (count,), generator=generator).tolist()  # noqa: E731
    common = draw(prefix)
    completions = []
    for group, length in enumerate((30, 117, 64)):
        prompt = Prompt(f"p{group}", common + draw(length), "")
        for sample, size in enumerate((5, 40, 91, 130)):
            completions.append(Completion(prompt, sample, draw(size), [0.0] * size, "", "stop", 1))
    return completions


@pytest.mark.parametrize("prefix", [0, 50])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_equals_separate_in_value_and_gradient(tmp_path: Path, dtype: str, prefix: int) -> None:
    torch.set_float32_matmul_precision("highest")
    policy = build(tmp_path, dtype)
    completions = batch(prefix)
    weights = torch.randn(sum(len(c.tokens) for c in completions), generator=torch.Generator().manual_seed(3)).cuda()

    def run(groups: list[list[Completion]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        forests = [pack(group, [Outcome("ok", 1.0)] * len(group)).forest.to("cuda") for group in groups]
        logprobs = torch.cat([policy.logprobs(forest, adapter=TRAINED).logprobs for forest in forests])
        grads = torch.autograd.grad(logprobs @ weights, list(policy.parameters(TRAINED).values()))
        return logprobs.detach(), list(grads)

    together, grad_together = run([completions])
    alone, grad_alone = run([[completion] for completion in completions])
    assert (together - alone).abs().max() < BOUND[dtype]
    scale = max(float(g.abs().max()) for g in grad_alone)
    assert (
        max(float((a - b).abs().max()) for a, b in zip(grad_together, grad_alone, strict=True)) < BOUND[dtype] * scale
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_engine_and_trainer_agree_on_the_device(tmp_path: Path, dtype: str) -> None:
    torch.set_float32_matmul_precision("highest")
    policy = build(tmp_path, dtype)
    engine = TorchEngine(policy)
    engine.publish(TRAINED, 1, policy.checksum(TRAINED))
    requests = [Request(c.prompt, [i, i + 100, i + 200]) for i, c in enumerate(batch(50)[::4])]
    found = list(engine.generate(requests, Sampling(max_tokens=60), adapter=TRAINED))
    found.sort(key=lambda c: (c.prompt.id, c.sample))
    experience = pack(found, [Outcome("ok", 0.0)] * len(found))
    scores = policy.logprobs(experience.forest.to("cuda"), adapter=TRAINED).logprobs.cpu()
    assert (scores - experience.rollout_logprobs).abs().mean() < BOUND[dtype] / 3

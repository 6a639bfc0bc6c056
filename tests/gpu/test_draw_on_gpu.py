"""Tokens drawn by the compiled kernels are those that the plain operations draw; the head's sums are not rounded."""

import pytest
import torch

from lorl.policy.logprobs import linear_logits
from lorl.rollout.engine import Sampling
from lorl.rollout.vllm.sampler import Batch, CompiledDraw, draw_into

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"temperature": 0.0}, {"top_p": 0.9, "top_k": 50}])
def test_compiled_draws_are_the_plain_ones(sampling: dict[str, float]) -> None:
    how = Sampling(max_tokens=16, **sampling)  # type: ignore[arg-type]
    generator = torch.Generator("cuda").manual_seed(0)
    compiled = CompiledDraw()
    for batch in (64, 33, 1):
        logits = 3 * torch.randn(batch, 32_100, device="cuda", generator=generator)
        rows = torch.randperm(99, device="cuda")[:batch]
        prompts = torch.randint(5, 9, (batch,), device="cuda")
        lengths = (prompts + torch.randint(0, 16, (batch,), device="cuda")).int()
        discarded = torch.rand(batch, device="cuda", generator=generator) < 0.2
        uniforms = torch.rand(100, 17, device="cuda", dtype=torch.float64, generator=generator)
        plain, fused = torch.zeros(2, 100, 17, device="cuda")
        with torch.inference_mode():
            expected = draw_into(logits, Batch(rows, prompts, lengths, discarded, uniforms, plain), how)
            found = compiled(logits, Batch(rows, prompts, lengths, discarded, uniforms, fused), how)
        assert (found == expected).float().mean() > 0.98  # the last digit of a sum may fall on a token's edge
        same = (found == expected)[:, 0]
        position = (lengths - prompts).long()
        assert not plain[rows, position][discarded].any()
        assert torch.allclose(fused[rows, position][same], plain[rows, position][same], atol=1e-5)


def test_logits_are_not_rounded_to_the_weights_precision() -> None:
    hidden = torch.randn(64, 512, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1000, 512, device="cuda", dtype=torch.bfloat16)
    exact = hidden.double() @ weight.double().T
    assert linear_logits(hidden, weight).dtype == torch.float32
    off = (linear_logits(hidden, weight) - exact).abs().mean()
    assert off < 0.01 * ((hidden @ weight.T) - exact).abs().mean()

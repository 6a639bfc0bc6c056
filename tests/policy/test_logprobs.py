"""Chunked log-probabilities and entropies against a plain float64 log_softmax and its autograd gradient."""

import pytest
import torch

from lorl.policy import logprobs as module
from lorl.policy.logprobs import head_logprobs, linear_logprobs


def reference(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, temperature: float):
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("path", ["linear", "any head"])
def test_values_and_gradients(monkeypatch: pytest.MonkeyPatch, rows: int, temperature: float, path: str) -> None:
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 4 * 101 * 8)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 16, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(101, 16, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, 101, (rows,), generator=generator)
    a, b = torch.randn(2, rows, dtype=torch.float64, generator=generator)
    if path == "linear":
        got = linear_logprobs(hidden, weight, targets, temperature=temperature, entropy=True)
    else:
        head = torch.nn.functional.linear
        got = head_logprobs(
            hidden, lambda x: head(x, weight), targets, vocabulary=101, temperature=temperature, entropy=True
        )
    want = reference(hidden, weight, targets, temperature)
    for mine, theirs in zip(got, want, strict=True):
        assert mine is not None
        assert torch.allclose(mine, theirs, atol=1e-12)
    if rows:
        (mine,) = torch.autograd.grad((got[0] * a + got[1] * b).sum(), hidden)
        (theirs,) = torch.autograd.grad((want[0] * a + want[1] * b).sum(), hidden)
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_nothing_of_vocabulary_width_is_kept_for_the_backward_pass() -> None:
    hidden = torch.randn(64, 16, requires_grad=True)
    weight = torch.randn(5000, 16)
    kept: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        linear_logprobs(hidden, weight, torch.zeros(64, dtype=torch.int64), entropy=True)
    assert kept
    assert max(kept) <= 64 * 16

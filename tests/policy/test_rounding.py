"""In half precision the trainer rounds where vLLM's kernels do. tests/gpu compares it with the kernels themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.policy.attention import Rule
from lorl.policy.load import load_policy
from lorl.policy.policy import Policy

TOKENS = torch.arange(2, 202)


class SeenError(Exception):
    """What the first layer asked its layout."""

    def __init__(self, query: Tensor, key: Tensor) -> None:
        self.query, self.key = query, key


class Asking:
    spans = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: Rule) -> Tensor:
        raise SeenError(query, key)


def load(folder: Path, dtype: str) -> tuple[Policy, Any]:
    policy = load_policy(ModelConfig(path=str(folder), dtype=dtype), AdapterConfig(rank=4), seed=0)  # type: ignore[arg-type]
    return policy, policy.peft.get_base_model()


def share(found: Tensor, expected: Tensor) -> float:
    return float((found == expected.to(found.dtype)).float().mean())


def test_a_norm_rounds_once(tiny_model: Path) -> None:
    _, base = load(tiny_model, "bfloat16")
    norm = base.model.layers[0].post_attention_layernorm
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        norm.weight.copy_(1 + 0.3 * torch.randn(norm.weight.shape, generator=generator))
    x = torch.randn(300, norm.weight.numel(), generator=generator).to(torch.bfloat16)
    wide = x.double()
    exact = wide * (wide.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight.double()
    assert share(norm(x), exact) > 0.999  # float32 on the way can fall on the other side of a tie
    assert share(type(norm).forward(norm, x), exact) < 0.9


def test_queries_and_keys_are_rotated_in_float32_and_rounded_once(tiny_model: Path) -> None:
    policy, base = load(tiny_model, "bfloat16")
    attend, norm = base.model.layers[0].self_attn, base.model.layers[0].input_layernorm
    positions = torch.arange(200)
    with torch.no_grad(), pytest.raises(SeenError) as seen:
        policy.hidden(Asking(), TOKENS, positions, adapter=None)
    with torch.no_grad():
        hidden = norm(base.model.embed_tokens(TOKENS))
        size = attend.head_dim
        angles = positions[:, None] * base.model.rotary_emb.inv_freq
        cos, sin = (wave(angles).to(torch.bfloat16).double() for wave in (torch.cos, torch.sin))
        for found, layer in ((seen.value.query, attend.q_proj), (seen.value.key, attend.k_proj)):
            half, other = layer(hidden).view(200, -1, size).transpose(0, 1).double().split(size // 2, -1)
            exact = torch.cat([half * cos - other * sin, other * cos + half * sin], -1)
            assert found.dtype == torch.bfloat16
            assert share(found, exact) > 0.999


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3_text", "phi3"])
def test_every_family_loads_and_float32_is_left_alone(tmp_path: Path, kind: str) -> None:
    folder = save_tiny_model(tmp_path, kind)
    load(folder, "bfloat16")  # compares the packed pass with transformers' own attentions
    _, base = load(folder, "float32")
    found = [m for m in base.modules() if type(m).__name__.endswith(("RMSNorm", "RotaryEmbedding"))]
    assert found
    assert not any("forward" in vars(module) or module._forward_hooks for module in found)

"""The vLLM engine on a CUDA device, in bfloat16: one base, adapters in slots, folds, rest and rebuild."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lorl.errors import UserError
from lorl.policy.load import TRAINED
from lorl.policy.sharing import Weights, unshared_bytes
from lorl.rollout.engine import Sampling
from vllm_engines import Opened, addresses, distance, draw, needs_vllm, opened, run, save_model

pytestmark = [
    pytest.mark.gpu,
    needs_vllm[1],
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BOUND = 0.05  # mean |log-probability difference| of two bfloat16 implementations


@pytest.fixture(scope="module", params=["eager", "graphs"])
def engine(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Opened]:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}
    model = save_model(
        tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=4, initializer_range=0.05, **shape
    )
    keys = ["model.device=cuda", "rollout.memory_fraction=0.05", "rollout.rest=always"]
    keys.append(f"rollout.enforce_eager={str(request.param == 'eager').lower()}")
    with opened(model, *keys) as found:
        yield found


def test_one_base_in_memory(engine: Opened) -> None:
    inside = engine.engine.inside
    assert unshared_bytes(engine.policy.base_tensors(), Weights(inside.weights(), inside.packed_modules())) == 0


def test_engine_and_trainer_agree_through_slot_and_fold(engine: Opened) -> None:
    before = engine.policy.base_checksum()
    for version in range(1, 6):
        draw(engine.policy, version)
        engine.publish(version=version)
    for adapter, folds in ((None, False), (TRAINED, False), (TRAINED, True)):
        engine.engine.folds = folds
        found = run(engine.engine, adapter, Sampling(max_tokens=32, ignore_eos=True), n=4)
        assert distance(engine.policy, found, adapter) < BOUND
        engine.engine.folds = False
    assert engine.policy.base_checksum() == before
    other = run(engine.engine, TRAINED, Sampling(max_tokens=32, ignore_eos=True), n=4)
    assert distance(engine.policy, other, None) > 2 * BOUND  # the adapter says something else than the base


@torch.no_grad()
def test_norms_and_rotations_round_as_vllms_kernels(engine: Opened) -> None:
    """The kernels that a decoding step runs, and what runs in their place in training: the same to the bit, almost
    everywhere (sums of float32 in another order can fall on the other side of a tie)."""
    theirs, base = engine.engine.inside.model.model.layers[1], engine.policy.peft.get_base_model()
    mine: Any = base.model.layers[1]
    generator = torch.Generator("cuda").manual_seed(0)
    x, residual, query = (torch.randn(300, 256, device="cuda", generator=generator).bfloat16() for _ in range(3))
    weight = theirs.post_attention_layernorm.weight  # the same memory on both sides
    before = weight.clone()
    weight.copy_(1 + 0.3 * torch.randn(256, device="cuda", generator=generator))
    normed, summed = theirs.post_attention_layernorm(x.clone(), residual.clone())
    assert torch.equal(summed, x + residual)
    assert share(mine.post_attention_layernorm(summed), normed) > 0.999
    assert share(type(mine.post_attention_layernorm).forward(mine.post_attention_layernorm, summed), normed) < 0.9
    weight.copy_(before)
    positions = torch.arange(300, device="cuda")
    rotated, _ = theirs.self_attn.rotary_emb(positions, query.clone(), query[:, :128].clone())
    angles = base.model.rotary_emb(query, positions[None])
    plain = query.view(1, 300, 4, 64).transpose(1, 2)
    found, _ = apply_rotary_pos_emb(plain, plain, *angles)
    assert found.dtype == torch.float32
    assert share(found.bfloat16().transpose(1, 2).reshape(300, 256), rotated) > 0.999
    rounded, _ = apply_rotary_pos_emb(plain, plain, *(angle.bfloat16() for angle in angles))
    assert share(rounded.transpose(1, 2).reshape(300, 256), rotated) < 0.9


def share(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found == expected).float().mean())


def test_resting_gives_memory_back_and_waking_takes_it(engine: Opened) -> None:
    sampling = Sampling(max_tokens=8, ignore_eos=True, temperature=0.0)
    before = run(engine.engine, None, sampling)
    awake = torch.cuda.mem_get_info()[0]
    where = addresses(engine.policy)
    engine.engine.rest()
    assert torch.cuda.mem_get_info()[0] - awake > 0.04 * torch.cuda.mem_get_info()[1]
    assert engine.engine.resting_bytes > 0.04 * torch.cuda.mem_get_info()[1]
    assert [c.tokens for c in run(engine.engine, None, sampling)] == [c.tokens for c in before]
    assert addresses(engine.policy) == where
    assert engine.engine.resting_bytes == 0


def test_a_cache_that_cannot_wake_says_how_large_it_may_be(engine: Opened) -> None:
    sampling = Sampling(max_tokens=8, ignore_eos=True, temperature=0.0)
    before = run(engine.engine, None, sampling)
    engine.engine.rest()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(int(free - 0.02 * total), dtype=torch.uint8, device="cuda")  # the cache wants 0.05
    with pytest.raises(UserError, match=r"cannot wake.*set rollout\.memory_fraction below 0\.0\d"):
        run(engine.engine, None, sampling)
    del held
    assert [c.tokens for c in run(engine.engine, None, sampling)] == [c.tokens for c in before]


def test_rebuilt_over_the_same_weights(engine: Opened) -> None:
    sampling = Sampling(max_tokens=8, ignore_eos=True, temperature=0.0)
    before, where = run(engine.engine, None, sampling), addresses(engine.policy)
    engine.engine.rebuild()
    draw(engine.policy, 9)
    engine.publish(version=9)
    assert addresses(engine.policy) == where
    assert [c.tokens for c in run(engine.engine, None, sampling)] == [c.tokens for c in before]

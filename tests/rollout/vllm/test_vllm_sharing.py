"""One base for policy and engine: no byte twice, every parameter the checkpoint's, whatever the engine fuses."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorl.errors import UserError
from lorl.policy.load import TRAINED
from lorl.policy.sharing import CannotBindError, Weights, unshared_bytes
from lorl.rollout.vllm import shared, versions
from vllm_engines import Opened, base_parameters, distance, draw, needs_vllm, opened, run, save_model

pytestmark = needs_vllm

HEADS = {"head_dim": 32}
GEMMA2 = HEADS | {"sliding_window": 64, "query_pre_attn_scalar": 32}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {"tie_word_embeddings": False, "num_key_value_heads": 2}),
    "smollm": ("llama", {"vocab_size": 320}),  # tied; not padded
    "qwen2": ("qwen2", {}),  # biases
    "qwen3": ("qwen3", HEADS),  # norms of queries and keys
    "mistral": ("mistral", HEADS | {"tie_word_embeddings": False, "sliding_window": None}),
    "gemma": ("gemma", HEADS),
    "gemma3": ("gemma3_text", HEADS | {"sliding_window": 64, "initializer_range": 0.1}),
    "gemma2": ("gemma2", GEMMA2 | {"attn_logit_softcapping": 2.0, "initializer_range": 0.1}),
    "phi": ("phi", {"tie_word_embeddings": False}),  # vLLM borrows transformers' code; the head has a bias
    "smollm3": ("smollm3", {"initializer_range": 0.1}),  # borrowed too; every fourth layer has no positions
    "phi3": ("phi3", {"tie_word_embeddings": False}),  # the checkpoint is fused as the engine is
}


@pytest.fixture(scope="module", params=list(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Opened]]:
    model_type, overrides = CASES[request.param]
    folder = save_model(tmp_path_factory.mktemp("models") / request.param, model_type, **overrides)
    with opened(folder) as found:
        yield folder, found


def test_no_byte_of_the_base_is_in_memory_twice(case: tuple[Path, Opened]) -> None:
    _, found = case
    inside = found.engine.inside
    assert unshared_bytes(found.policy.base_tensors(), Weights(inside.weights(), inside.packed_modules())) == 0
    assert found.told == ["the base is shared with vLLM: 0 extra bytes"]


def test_every_parameter_is_the_checkpoints_bit_for_bit(case: tuple[Path, Opened]) -> None:
    folder, found = case
    stored = load_file(folder / "model.safetensors")
    own = base_parameters(found.policy)
    assert own.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(own[name], tensor), name


def test_engine_and_trainer_say_the_same_with_and_without_adapter(case: tuple[Path, Opened]) -> None:
    _, found = case
    draw(found.policy, 1)
    found.publish()
    for adapter in (None, TRAINED):
        assert distance(found.policy, run(found.engine, adapter), adapter) < 1e-5


def test_what_is_written_to_the_policys_parameters_the_engine_reads(case: tuple[Path, Opened]) -> None:
    _, found = case
    before = run(found.engine)
    parameters = [p for name, p in base_parameters(found.policy).items() if "layers.1" in name and p.dim() == 2]
    kept = [p.clone() for p in parameters]
    try:
        for parameter in parameters:
            parameter.mul_(1.5)
        found.engine.inside.engine.reset_prefix_cache()
        after = run(found.engine)
        assert [c.tokens for c in after] != [c.tokens for c in before]
        assert distance(found.policy, after, None) < 1e-5
    finally:
        for parameter, original in zip(parameters, kept, strict=True):
            parameter.copy_(original)
        found.engine.inside.engine.reset_prefix_cache()


def test_a_model_that_cannot_be_bound_is_held_twice_and_still_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if this vLLM fused projections in a way that its mapping does not tell."""
    folder = save_model(tmp_path / "llama")
    packed = versions.Inside.packed_modules
    monkeypatch.setattr(versions.Inside, "packed_modules", lambda inside: {} if not launched else packed(inside))
    launched: list[bool] = []
    with opened(folder) as found:
        launched.append(True)
        size = sum(p.numel() * 4 for p in base_parameters(found.policy).values())
        assert len(found.told) == 1
        assert found.told[0].startswith(f"the base is in memory twice, {size / 2**20:.1f} MiB more than shared: ")
        assert "q_proj" in found.told[0]
        draw(found.policy, 1)
        found.publish()
        assert distance(found.policy, run(found.engine, TRAINED), TRAINED) < 1e-5
        found.engine.rebuild()
        found.publish()
        assert distance(found.policy, run(found.engine, TRAINED), TRAINED) < 1e-5


def test_weights_that_vllm_repacks_are_seen_and_the_policy_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As vLLM's CPU build does by itself: for oneDNN, and the parameters are left empty."""
    prepare = versions.prepare

    def prepared(*, cpu: bool) -> None:
        prepare(cpu=cpu)
        monkeypatch.setattr("vllm._custom_ops._supports_onednn", True)

    monkeypatch.setattr(versions, "prepare", prepared)
    with opened(save_model(tmp_path / "llama")) as found:
        size = sum(p.numel() * 4 for p in base_parameters(found.policy).values())
        (told,) = found.told
        assert told.startswith(f"the base is in memory twice, {size / 2**20:.1f} MiB more than shared: ")
        assert told.endswith("gives (0,) torch.float32")
        draw(found.policy, 1)
        found.publish()
        assert distance(found.policy, run(found.engine, TRAINED), TRAINED) < 1e-5


def test_no_way_of_repacking_is_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm._custom_ops as ops
    from vllm.model_executor.layers import utils

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    versions.prepare(cpu=True)
    assert not ops._supports_onednn
    assert not utils.check_cpu_sgl_kernel(64, 64, torch.bfloat16)


def test_a_borrowed_model_that_cannot_be_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM has changed the class that a copy of the base would be of."""

    def bind(*_: object) -> None:
        raise CannotBindError("lm_head.weight is laid out otherwise")

    with monkeypatch.context() as patch:
        patch.setattr(shared, "bind", bind)
        with pytest.raises(UserError, match=r"lm_head\.weight is laid out.*rollout\.engine=torch"):
            opened(save_model(tmp_path / "olmo2", "olmo2")).__enter__()
    with opened(save_model(tmp_path / "llama")) as found:  # the engine was shut down, and the next one is as before
        assert distance(found.policy, run(found.engine), None) < 1e-5


def test_a_base_that_is_not_shared_cannot_be_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions.Inside, "packed_modules", lambda inside: {})
    with (
        pytest.raises(UserError, match="adapter_mode=fold needs a shared base"),
        opened(save_model(tmp_path / "llama"), "rollout.adapter_mode=fold"),
    ):
        pass

"""A folded base says what the adapter says, and afterwards it is the base again, byte for byte."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import save_tiny_model, tiny_tokenizer
from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion, Forest, Outcome, Prompt
from lorl.packing import pack
from lorl.plan.footprint import fold_bytes
from lorl.plan.lora import lora_on
from lorl.plan.shape import find_shape
from lorl.policy import attention
from lorl.policy import fold as fold_module
from lorl.policy.checksums import tensor_checksum
from lorl.policy.fold import fold
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy

NAME = "policy"
TOKENS = torch.randint(2, 258, (1, 12), generator=torch.Generator().manual_seed(0))
INTEGERS = {2: torch.int16, 4: torch.int32}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def make(folder: Path, dtype: torch.dtype = torch.float32, **lora: object) -> Policy:
    """A policy whose adapter is about a hundredth of its base."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention.NAME)
    base.requires_grad_(False)
    torch.manual_seed(0)
    fields = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | lora
    peft = get_peft_model(base, LoraConfig(**fields), adapter_name=NAME)  # type: ignore[arg-type]
    assert isinstance(peft, PeftModel)
    policy = Policy(peft, tiny_tokenizer(), trained=NAME)
    draw(policy, 0.01)
    return policy


def draw(policy: Policy, std: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.parameters(NAME).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)


def weights(policy: Policy) -> dict[str, Tensor]:
    """The base's memory itself, past the policy's guard."""
    return {name: value.detach() for name, value in policy._base.named_parameters() if "lora_" not in name}


def snapshot(policy: Policy) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in weights(policy).items()}


def assert_same_bytes(policy: Policy, before: dict[str, Tensor]) -> None:
    for name, value in weights(policy).items():
        integer = INTEGERS[value.itemsize]
        assert torch.equal(value.view(integer), before[name].view(integer)), name


def weight_of(policy: Policy, name: str) -> Tensor:
    return weights(policy)[f"{name}.base_layer.weight"]


def set_delta(policy: Policy, layer: str, delta: float) -> None:
    """Makes scaling * B A of the layer `delta` everywhere, and of every other layer zero."""
    for name, parameter in policy.parameters(NAME).items():
        parameter.data.zero_()
        if f"{layer}.lora_" in name:
            scaling = 2.0  # alpha 8 over rank 4
            parameter.data[(..., 0) if "lora_B" in name else (0, ...)] = delta / scaling if "lora_B" in name else 1.0


def own_logits(policy: Policy) -> Tensor:
    """The base alone, by transformers' own forward pass and attention, adapters off."""
    policy._base.set_attn_implementation("eager")
    policy._peft.base_model.disable_adapter_layers()
    with torch.no_grad():
        logits = policy._base(input_ids=TOKENS, use_cache=False).logits[0].float()
    policy._base.set_attn_implementation(attention.NAME)
    policy._selected = ...
    return logits


def adapter_logits(policy: Policy) -> Tensor:
    """peft's own forward pass with the adapter on."""
    policy._base.set_attn_implementation("eager")
    policy.select(NAME)
    with torch.no_grad():
        logits = policy._base(input_ids=TOKENS, use_cache=False).logits[0].float()
    policy._base.set_attn_implementation(attention.NAME)
    return logits


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"q_proj": 32, "up_proj": 1}},
        {"target_modules": ["v_proj", "gate_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "some layers"],
)
def test_the_folded_base_says_what_the_adapter_says(tiny_model: Path, lora: dict[str, object]) -> None:
    policy = make(tiny_model, **lora)
    draw(policy, 0.1)
    expected, alone = adapter_logits(policy), own_logits(policy)
    assert (expected - alone).abs().max() > 0.1
    with fold(policy, NAME):
        assert torch.allclose(own_logits(policy), expected, atol=1e-4)
    assert torch.equal(own_logits(policy), alone)


def test_a_folded_bf16_weight_is_the_sum_of_what_slots_hold_rounded_once(tiny_model: Path) -> None:
    policy = make(tiny_model, torch.bfloat16)
    layer = "model.layers.0.mlp.down_proj"
    before = weight_of(policy, layer).clone()
    parameters = {name: value for name, value in policy.parameters(NAME).items() if f"{layer}.lora_" in name}
    down, up = (value.to(torch.bfloat16) for value in parameters.values())
    with torch.autocast("cpu", dtype=torch.bfloat16), fold(policy, NAME):  # autocast must not reach the product
        expected = (before.double() + 2.0 * up.double() @ down.double()).to(torch.bfloat16)
        folded = weight_of(policy, layer)
        assert (folded != expected).float().mean() < 1e-3  # float32 and float64 sums part at a tie now and then
        assert not torch.equal(folded, before)


@DTYPES
def test_fifty_folds_of_any_size_leave_every_byte(tiny_model: Path, dtype: torch.dtype) -> None:
    policy = make(tiny_model, dtype)
    before, checksum, total = snapshot(policy), policy.base_checksum(), 0
    for i, size in enumerate([1e-6, 1e-3, 0.02, 1.0, 300.0] * 10):
        draw(policy, size, seed=i)
        with fold(policy, NAME) as folded:
            total += folded.lost
        assert_same_bytes(policy, before)
        assert policy.base_checksum() == checksum
    assert total > 0


@DTYPES
def test_subtraction_alone_would_not_do_and_the_record_is_small(tiny_model: Path, dtype: torch.dtype) -> None:
    """At a hundredth of the base's size, as training makes them."""
    policy = make(tiny_model, dtype, target_modules=["down_proj"], r=1)
    before = snapshot(policy)
    with fold(policy, NAME) as folded:
        assert folded.entries == 2 * 48 * 96
        assert 0 < folded.lost < 0.1 * folded.entries
        assert folded.record_bytes < 0.5 * folded.entries * dtype.itemsize
    assert folded.record_bytes == 0
    assert_same_bytes(policy, before)


def planted(value: float, delta: float) -> Callable[[Tensor], float]:
    def plant(weight: Tensor) -> float:
        weight.fill_(value)
        return delta

    return plant


def minus_zero_and_others(weight: Tensor) -> float:
    weight.view(-1)[::3] = -0.0
    return 0.25


@DTYPES
@pytest.mark.parametrize(
    ("plant", "all_lost"),
    [
        (planted(1.9921875, 0.013671875), None),  # the sum is past the next power of two, where the grid is coarser
        (planted(-0.0, 0.0), True),  # -0.0 + 0.0 is 0.0
        (planted(0.3, -0.3), None),  # the sum is what rounding left
        (planted(1e-30, 1.0), True),  # nothing of it survives
        (planted(1.0, float("inf")), True),
        (minus_zero_and_others, None),
    ],
    ids=["next power of two", "minus zero", "cancellation", "swamped", "infinite delta", "a third minus zero"],
)
def test_values_made_to_be_lost_come_back(
    tiny_model: Path, dtype: torch.dtype, plant: Callable[[Tensor], float], all_lost: bool | None
) -> None:
    policy, layer = make(tiny_model, dtype), "model.layers.1.self_attn.o_proj"
    set_delta(policy, layer, plant(weight_of(policy, layer)))
    before = snapshot(policy)
    with fold(policy, NAME) as folded:
        if all_lost:
            assert folded.lost >= weight_of(policy, layer).numel()
    assert_same_bytes(policy, before)


def test_a_weight_that_is_lost_whole_is_kept_whole(tiny_model: Path) -> None:
    policy = make(tiny_model, target_modules=["down_proj"])
    draw(policy, 1e9)
    with fold(policy, NAME) as folded:
        assert folded.lost > 0.9 * folded.entries
        assert folded.record_bytes == 4 * folded.entries


def test_the_adapter_may_learn_while_it_is_folded_in(tiny_model: Path) -> None:
    policy = make(tiny_model)
    before = snapshot(policy)
    with fold(policy, NAME):
        for parameter in policy.parameters(NAME).values():
            parameter.data.add_(1.0)
    assert_same_bytes(policy, before)


def test_writes_go_to_the_memory_that_an_engine_shares(tiny_model: Path) -> None:
    """Two layers of the base as rows of one tensor, as an engine that fuses them holds them."""
    policy = make(tiny_model, torch.bfloat16)
    attn = policy._base.get_submodule("model.layers.0.self_attn")
    layers = [attn.k_proj.base_layer, attn.v_proj.base_layer]
    fused = torch.cat([layer.weight.data for layer in layers])
    for layer, rows in zip(layers, fused.split(24), strict=True):
        layer.weight = torch.nn.Parameter(rows, requires_grad=False)
    before, pointers = fused.clone(), [layer.weight.data_ptr() for layer in layers]
    with fold(policy, NAME):
        assert all((fused != before).view(2, -1).any(1))
    assert torch.equal(fused, before)
    assert [layer.weight.data_ptr() for layer in layers] == pointers


READS: dict[str, Callable[[Policy], object]] = {
    "hidden": lambda policy: policy.hidden(object(), TOKENS[0], TOKENS[0], adapter=None),  # type: ignore[arg-type]
    "logits": lambda policy: policy.logits(torch.zeros(1, 48)),
    "select": lambda policy: policy.select(NAME),
    "check_packing": lambda policy: policy.check_packing(),
    "base_fingerprint": lambda policy: policy.base_fingerprint(),
    "base_tensors": lambda policy: policy.base_tensors(),
    "base_checksum": Policy.base_checksum,
    "freeze_copy": lambda policy: policy.freeze_copy(NAME, "copy"),
    "add_adapter": lambda policy: policy.add_adapter(
        "other", LoraConfig(target_modules=["q_proj"]), seed=0, learns=False
    ),
    "fold": lambda policy: fold(policy, NAME),
}


@pytest.mark.parametrize("read", READS)
def test_nothing_reads_a_folded_base(tiny_model: Path, read: str) -> None:
    policy = make(tiny_model)
    policy.select(NAME)  # so that selecting it again has nothing to do
    with fold(policy, NAME), pytest.raises(InfrastructureError, match=r"can't be read: adapter 'policy' is folded"):
        READS[read](policy)


def test_it_is_read_again_afterwards(tiny_model: Path) -> None:
    policy = make(tiny_model)
    fingerprint = policy.base_fingerprint()
    with fold(policy, NAME):
        held = policy.checksum(NAME)  # adapters are no part of the base
    policy.check_packing()
    assert policy.base_fingerprint() == fingerprint
    assert policy.checksum(NAME) == held
    with fold(policy, NAME):
        pass


def test_undo_without_a_context_and_twice(tiny_model: Path) -> None:
    policy = make(tiny_model)
    before = snapshot(policy)
    folded = fold(policy, NAME)
    folded.undo()
    folded.undo()
    assert_same_bytes(policy, before)
    policy.check_packing()


def test_an_error_inside_still_restores(tiny_model: Path) -> None:
    policy = make(tiny_model)
    before = snapshot(policy)
    with pytest.raises(ZeroDivisionError), fold(policy, NAME):
        raise ZeroDivisionError
    assert_same_bytes(policy, before)
    policy.check_packing()


def test_an_error_on_the_way_restores_what_was_folded(tiny_model: Path) -> None:
    policy = make(tiny_model)
    last = policy._base.get_submodule("model.layers.1.mlp.down_proj.base_layer")
    first = weight_of(policy, "model.layers.0.self_attn.q_proj")
    policy.parameters(NAME)
    before, whole = first.clone(), last.weight
    last.weight = torch.nn.Parameter(torch.zeros(5, 7), requires_grad=False)  # the delta does not fit it
    with pytest.raises(RuntimeError, match="must match the size"):
        fold(policy, NAME)
    last.weight = whole
    assert torch.equal(first, before)
    policy.check_packing()


@DTYPES
def test_a_byte_that_changed_meanwhile_is_found_and_named(tiny_model: Path, dtype: torch.dtype) -> None:
    policy, layer = make(tiny_model, dtype), "model.layers.1.mlp.up_proj"
    folded = fold(policy, NAME)
    weight_of(policy, layer).view(-1).view(torch.uint8)[2 * dtype.itemsize - 1] ^= 0x80  # one sign
    with pytest.raises(InfrastructureError, match=rf"'policy' did not restore {layer}: .* load the base again"):
        folded.undo()
    with pytest.raises(InfrastructureError, match=f"can't be read: undoing .* did not restore {layer}"):
        policy.check_packing()


@pytest.mark.parametrize(
    ("lora", "named"),
    [
        ({"use_dora": True}, r"lora_A"),
        ({"lora_bias": True}, r"lora_B.bias"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"embed_tokens.lora_embedding_A"),
        ({"target_modules": ["lm_head", "q_proj"]}, r"lm_head.lora_A"),
    ],
    ids=["dora", "bias", "embedding", "tied head"],
)
def test_other_adapters_are_refused_by_name(tiny_model: Path, lora: dict[str, object], named: str) -> None:
    policy = make(tiny_model, **lora)
    before = snapshot(policy)
    with pytest.raises(UserError, match=rf"can't be folded .*{named}.*rollout.adapter_mode=adapter"):
        fold(policy, NAME)
    assert_same_bytes(policy, before)
    policy.select(NAME)


def test_a_head_of_its_own_is_folded(tmp_path: Path) -> None:
    policy = make(save_tiny_model(tmp_path, tie_word_embeddings=False), target_modules=["lm_head", "q_proj"])
    draw(policy, 0.1)
    expected = adapter_logits(policy)
    with fold(policy, NAME):
        assert torch.allclose(own_logits(policy), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_sees_one_bit_anywhere_and_order_but_not_place(dtype: torch.dtype) -> None:
    size = 5 * 2**21 + 5  # several chunks, and an end that is no whole word in bf16
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = tensor.view(INTEGERS[dtype.itemsize])
    before = tensor_checksum(tensor)
    for at in (0, 1, 2**21 - 1, 2**22, size - 1):
        for bit in (0, 8 * dtype.itemsize - 1):
            flip = torch.tensor(1 << bit).to(bits.dtype)
            bits[at] ^= flip
            assert tensor_checksum(tensor) != before
            bits[at] ^= flip
    chunk = 4 * 2**21 // dtype.itemsize
    for first, second in [(3, 5), (3, chunk + 8), (3, chunk + 3)]:
        swapped = tensor.clone()
        swapped[[first, second]] = tensor[[second, first]]
        assert tensor_checksum(swapped) != before
    elsewhere = torch.empty(size + 1, dtype=dtype)[1:].copy_(tensor)  # off the words' alignment in bf16
    assert tensor_checksum(elsewhere) == before


def test_two_flipped_signs_do_not_cancel(tiny_model: Path) -> None:
    policy = make(tiny_model, torch.bfloat16)
    before = policy.base_checksum()
    weight = weight_of(policy, "model.layers.0.self_attn.q_proj").view(-1)
    for first, second in [(3, 7), (1, 3), (3, 1027)]:
        weight[[first, second]] *= -1
        assert policy.base_checksum() != before
        weight[[first, second]] *= -1
    assert policy.base_checksum() == before


def test_memory_that_runs_out_leaves_the_base_and_says_what_to_set(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make(tiny_model, torch.bfloat16)
    before, prepare, done = snapshot(policy), fold_module._prepare, list[str]()

    def short(name: str, *args: Any) -> Any:
        if len(done) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(name)
        return prepare(name, *args)

    monkeypatch.setattr(fold_module, "_prepare", short)
    with pytest.raises(InfrastructureError, match=r"no memory is left to fold.*rollout\.adapter_mode=adapter"):
        fold(policy, NAME)
    assert_same_bytes(policy, before)
    assert policy.altered is None


@pytest.mark.parametrize("share", [0.001, 0.01, 0.04])
def test_the_plan_has_room_for_what_undoing_takes(tmp_path: Path, share: float) -> None:
    """For deltas of up to a twenty-fifth of the weights, larger than training at usual rates comes to."""
    policy = make(save_tiny_model(tmp_path, hidden_size=128, intermediate_size=256), torch.bfloat16)
    draw(policy, 1.0)
    layers = [module for module in policy._base.modules() if type(module) is Linear]
    with torch.no_grad():
        for layer in layers:
            up, down = layer.lora_B[NAME].weight, layer.lora_A[NAME].weight
            up *= share * layer.base_layer.weight.float().std() / (layer.scaling[NAME] * (up @ down)).std()
    shape = find_shape(str(tmp_path))
    with fold(policy, NAME) as folded:
        assert 0 < folded.record_bytes < fold_bytes(lora_on(shape, 4, "all-linear"), 2)


def test_the_trainer_rounds_as_the_fold_beside_it(tmp_path: Path) -> None:
    """In bfloat16, log-probabilities and all: of the weights that a fold leaves, for the adapter that is sampled and
    for a frozen copy of it, and not for a critic's."""
    config = AdapterConfig(rank=4)
    policy = load_policy(ModelConfig(path=str(save_tiny_model(tmp_path)), dtype="bfloat16"), config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    policy.freeze_copy(TRAINED, "reference")
    policy.freeze_copy(TRAINED, "critic")
    policy.add_scalar_head("critic", "value_head")
    forest = one_tree()
    with torch.no_grad():
        beside, value = score(policy, forest, TRAINED), score(policy, forest, "critic")
        policy.folds = True
        within, reference = score(policy, forest, TRAINED), score(policy, forest, "reference")
        assert torch.equal(score(policy, forest, "critic"), value)
        with fold(policy, TRAINED):
            policy.altered, why = None, policy.altered
            folded = score(policy, forest, None)
            policy.altered = why
    assert torch.equal(within, folded)
    assert torch.equal(reference, within)
    assert not torch.equal(beside, folded)


def score(policy: Policy, forest: Forest, adapter: str | None) -> Tensor:
    return policy.states(forest, adapter=adapter).float()


def one_tree() -> Forest:
    prompt = Prompt("p", list(range(2, 34)), "")
    answers = [Completion(prompt, i, list(range(40 + i, 80 + i)), [0.0] * 40, "", "stop", 1) for i in range(4)]
    return pack(answers, [Outcome("ok", 1.0)] * 4).forest

"""The formulas of bytes against what torch keeps and allocates on the CPU."""

import weakref
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import tiny_tokenizer
from lorl.config import AdapterConfig
from lorl.experience import Completion, Forest, Outcome, Prompt
from lorl.packing import pack
from lorl.plan import footprint
from lorl.plan.footprint import Pass
from lorl.plan.lora import Lora, lora_on
from lorl.plan.shape import Shape
from lorl.policy import adapters, attention, layers, lora
from lorl.policy.load import TRAINED
from lorl.policy.policy import Policy
from training_peak import training_peak_bytes

QWEN_LIKE: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
WIDE_HEADS = QWEN_LIKE | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
DEEP = QWEN_LIKE | {"num_hidden_layers": 12}  # in the first layer nothing is kept before the first adapted projection
DEEP_NARROW = QWEN_LIKE | {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
}


def build(
    model_type: str,
    sizes: Mapping[str, Any],
    *,
    rank: int,
    recompute: bool,
    targets: Any,
    dtype: torch.dtype,
    offload: bool = False,
) -> tuple[Policy, Shape, Lora]:
    config = AutoConfig.for_model(model_type, **sizes)
    base: Any = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    base.requires_grad_(False).eval()
    peft = adapters.attach(base, TRAINED, AdapterConfig(rank=rank, target_modules=targets), seed=0)
    lora.fuse(peft)
    layers.install(base, compiled=False, recompute=recompute, offload=offload)
    shape = Shape.of(config)
    return Policy(peft, tiny_tokenizer(), trained=TRAINED), shape, lora_on(shape, rank, targets)


def one_tree(prompt: int = 64, response: int = 40, samples: int = 8) -> Forest:
    generator = torch.Generator().manual_seed(0)
    asked = Prompt("p", torch.randint(2, 258, (prompt,), generator=generator).tolist(), "")
    answers = [[3 + i, *torch.randint(2, 258, (response - 1,), generator=generator).tolist()] for i in range(samples)]
    completions = [Completion(asked, i, a, [0.0] * len(a), "", "stop", 1) for i, a in enumerate(answers)]
    return pack(completions, [Outcome("ok", 1.0)] * samples).forest


def base_storages(policy: Policy) -> set[int]:
    return {parameter.untyped_storage().data_ptr() for parameter in policy.peft.parameters()}


def saved_bytes(policy: Policy, forest: Forest) -> int:
    """Of all storages that autograd keeps for a backward pass; parameters are not its own."""
    own, kept = base_storages(policy), dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = policy.logprobs(forest, adapter=TRAINED).logprobs
    assert logprobs.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class PeakBytes(TorchDispatchMode):
    """The most that is allocated at a time by the operations under it."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self._own, self._live = own, dict[int, int]()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._take(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _take(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if storage.data_ptr() in self._own or key in self._live or not storage.nbytes():
            return
        self._live[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.now -= self._live.pop(key)


CASES = [
    ("qwen2", QWEN_LIKE, 8, "all-linear"),
    ("qwen2", DEEP_NARROW, 64, "all-linear"),
    ("qwen2", QWEN_LIKE, 16, ["q_proj", "v_proj"]),
    ("qwen2", DEEP, 16, ["down_proj"]),
    ("llama", QWEN_LIKE, 32, "all-linear"),
    ("llama", WIDE_HEADS, 1, "all-linear"),
    ("qwen3", WIDE_HEADS, 8, "all-linear"),
    ("gemma3_text", QWEN_LIKE, 8, "all-linear"),
    ("gemma3_text", DEEP, 32, ["o_proj", "gate_proj"]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("model_type", "sizes", "rank", "targets"), CASES)
def test_kept_activations_are_what_autograd_saves(
    model_type: str, sizes: dict[str, Any], rank: int, targets: Any, dtype: torch.dtype
) -> None:
    policy, shape, adapter = build(model_type, sizes, rank=rank, recompute=False, targets=targets, dtype=dtype)
    forest = one_tree()
    tokens = forest.tokens.numel()
    how = Pass(dtype.itemsize, eager=True, recompute=False, span=tokens)
    assert footprint.kept_bytes(shape, adapter, tokens, how) == pytest.approx(saved_bytes(policy, forest), rel=0.1)


@pytest.mark.parametrize(("model_type", "sizes", "rank", "targets"), CASES)
def test_recomputed_layers_keep_their_inputs(model_type: str, sizes: dict[str, Any], rank: int, targets: Any) -> None:
    sizes = sizes | {"num_hidden_layers": 12}  # what lies outside the layers is not the point here
    policy, shape, adapter = build(model_type, sizes, rank=rank, recompute=True, targets=targets, dtype=torch.float32)
    forest = one_tree()
    tokens = forest.tokens.numel()
    how = Pass(4, eager=True, recompute=True, span=0)
    assert footprint.kept_bytes(shape, adapter, tokens, how) == pytest.approx(saved_bytes(policy, forest), rel=0.1)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("model_type", "sizes", "rank", "targets"), CASES)
def test_the_peak_of_a_pass_is_what_torch_allocates(
    model_type: str, sizes: dict[str, Any], rank: int, targets: Any, recompute: bool
) -> None:
    policy, shape, adapter = build(
        model_type, sizes, rank=rank, recompute=recompute, targets=targets, dtype=torch.float32
    )
    forest = one_tree()
    tokens = forest.tokens.numel()
    with PeakBytes(base_storages(policy)) as seen:
        policy.logprobs(forest, adapter=TRAINED).logprobs.sum().backward()
    how = Pass(4, eager=True, recompute=recompute, span=tokens)
    targets = forest.distinct()[0].numel()
    assert training_peak_bytes(shape, adapter, tokens, targets, how, "cpu") == pytest.approx(seen.peak, rel=0.1)

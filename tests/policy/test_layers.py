"""Layers that are compiled or computed again say what plain ones say. Compilation for a GPU runs in tests/gpu."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.critic import CRITIC
from lorl.experience import Completion, Forest, Outcome, Prompt
from lorl.packing import pack
from lorl.plan import footprint
from lorl.plan.lora import lora_on
from lorl.plan.shape import find_shape
from lorl.policy import adapters, layers, varlen
from lorl.policy.attention import ForestAttention, Rule
from lorl.policy.load import TRAINED, kept_bytes, load_policy
from lorl.policy.policy import Policy


def load(folder: Path, dtype: str = "float32") -> Policy:
    policy = load_policy(ModelConfig(path=str(folder), dtype=dtype), AdapterConfig(rank=4), seed=0)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:  # peft starts it at zero
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy


def forest_of(groups: int, samples: int) -> Forest:
    generator = torch.Generator().manual_seed(groups)
    draw = lambda count: torch.randint(2, 258, (count,), generator=generator).tolist()  # noqa: E731
    completions = []
    for group in range(groups):
        prompt = Prompt(f"p{group}", [2 + group, *draw(9)], "")
        completions += [Completion(prompt, i, draw(5 + i), [0.0] * (5 + i), "", "stop", 1) for i in range(samples)]
    return pack(completions, [Outcome("ok", 1.0)] * len(completions)).forest


def train(policy: Policy, forest: Forest) -> tuple[Tensor, Tensor, int]:
    """Log-probabilities, adapter gradients, and bytes kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = policy.parameters(TRAINED)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        logprobs = policy.logprobs(forest, adapter=TRAINED).logprobs
    for parameter in parameters.values():
        kept.pop(parameter.data_ptr(), None)
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(3))
    grads = torch.autograd.grad(logprobs @ weights, list(parameters.values()))
    return logprobs.detach(), torch.cat([grad.flatten() for grad in grads]), sum(kept.values())


def test_recomputed_layers_give_the_same_numbers_from_less_memory(tiny_model: Path) -> None:
    policy = load(tiny_model)
    forest = forest_of(3, 4)
    logprobs, grads, kept = train(policy, forest)
    layers.install(policy._base, compiled=False, recompute=True)
    again, grads_again, kept_again = train(policy, forest)
    assert torch.equal(again, logprobs)
    assert torch.equal(grads_again, grads)
    assert kept_again < kept / 2


def test_nothing_changes_on_a_cpu_by_itself(tiny_model: Path) -> None:
    policy = load(tiny_model)
    layers.install(policy._base, compiled=False, recompute="auto")
    decoder = policy._base.base_model
    assert all("forward" not in vars(layer) for layer in decoder.layers)  # type: ignore[union-attr]


def test_auto_recomputes_a_pass_that_would_take_most_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "_free", lambda device: 1000)
    stack = layers._Stack(False, "auto", False, lambda tokens: 100 * tokens)
    for tokens, again in ((8, False), (9, True)):
        hidden = torch.zeros(1, tokens, 4)
        assert [stack.recomputes(hidden, first=first) for first in (True, False)] == [again, again]
    assert layers._Stack(False, "auto", False, None).recomputes(torch.zeros(1, 1, 4), first=True)


def test_what_a_pass_keeps_is_what_the_plan_counts(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", "qwen2")
    shape, how = find_shape(str(folder)), footprint.Pass(4, eager=True, recompute=False)
    for given, planned in ((["q_proj", "v_proj"], ["q_proj", "v_proj"]), (["q_proj", "lm_head"], "all-linear")):
        policy = load_policy(ModelConfig(path=str(folder)), AdapterConfig(rank=4, target_modules=given), seed=0)
        critic = adapters.configured(AdapterConfig(rank=32))
        policy.add_adapter(CRITIC, critic, seed=0, learns=True)
        kept = kept_bytes(policy.peft)
        assert kept is not None
        for name, counted in ((TRAINED, lora_on(shape, 4, planned)), (CRITIC, lora_on(shape, 32, "all-linear"))):
            policy.select(name)
            assert kept(96) == footprint.kept_bytes(shape, counted, 96, how)


def test_nobody_knows_what_a_mixture_of_experts_keeps() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    config = AutoConfig.for_model("mixtral", **sizes, num_attention_heads=2, num_key_value_heads=1)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        assert kept_bytes(adapters.attach(base, TRAINED, AdapterConfig(target_modules=["q_proj"]), seed=0)) is None


@pytest.fixture
def attention_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that takes the GPU's path: spans at hand, short passes compiled, the kernel's call answered densely."""
    forests: dict[int, Forest] = {}
    plain = ForestAttention.__init__

    def with_spans(self: ForestAttention, forest: Forest, *, record: bool = False) -> None:
        plain(self, forest, record=record)
        self.spans = varlen.spans(forest)
        forests[forest.tokens.numel()] = forest

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
        dense = ForestAttention.__new__(ForestAttention)
        plain(dense, forests[len(query)])
        flat = (x.transpose(0, 1) for x in (query, key, value))
        out = dense.attend(0, *flat, Rule(query.shape[-1] ** -0.5))  # type: ignore[misc]
        return out.transpose(0, 1).contiguous(), query.new_zeros(query.shape[1], len(query), dtype=torch.float32)

    varlen.span_attention.register_kernel("cpu")(attend)
    monkeypatch.setattr(ForestAttention, "__init__", with_spans)
    monkeypatch.setattr(layers, "MIN_TOKENS", 0)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.mark.usefixtures("attention_by_hand")
@pytest.mark.parametrize("folds", [False, True])
def test_all_layers_and_forests_share_one_compilation(tmp_path: Path, folds: bool) -> None:
    policy = load(save_tiny_model(tmp_path, hidden_size=64, initializer_range=0.05), dtype="bfloat16")
    policy.folds = folds
    forests = [forest_of(3, 4), forest_of(5, 2), forest_of(4, 1)]
    with torch.no_grad():
        plain = [policy.logprobs(forest, adapter=TRAINED).logprobs for forest in forests]
        layers.install(policy._base, compiled=True, recompute=False)
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters["stats"]
        counters.clear()
        found = [policy.logprobs(forest, adapter=TRAINED).logprobs for forest in forests]
    assert counters["unique_graphs"] == 1
    for mine, theirs in zip(found, plain, strict=True):
        assert (mine - theirs).abs().max() < 0.02

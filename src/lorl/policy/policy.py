"""The policy: one frozen base in memory, named adapters on it, and the quantities that training reads off it."""

import re
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lorl.errors import InfrastructureError, UserError
from lorl.experience import Forest
from lorl.policy import adapters, attention
from lorl.policy.checksums import checksum, fingerprint
from lorl.policy.logprobs import head_logprobs, linear_kl, linear_logits, linear_logprobs
from lorl.policy.lora import Sums

_NOISE = 2.0  # times what two exact attentions differ by in half precision
_DIFFERENT = 0.3  # relative: attention that leaves something out is off by more, however deep the model
# How peft names what adapters hold, and what it puts around a module of the base.
_LEARNED = re.compile(r"\blora_|\.modules_to_save\.|\.trainable_tokens_")
_WRAPPED = re.compile(r"\.(base_layer|original_module|token_adapter)\b")


@dataclass(slots=True)
class Scores:
    """What one pass says of the sampled tokens. `entropy` is None unless asked for."""

    logprobs: Tensor  # float32[M]
    entropy: Tensor | None  # float32[M], nats
    sum_pi_squared: Tensor | None = None  # float32[M], sum over the vocabulary of the squared probabilities
    kl: Tensor | None = None  # float32[M], the exact divergence from what `anchor` says


class SplitPasses(Protocol):
    """Training and scoring passes that several ranks make together, each over some of the tokens
    (`lorl.parallel.ulysses`)."""

    def split(self, forest: Forest) -> tuple[attention.Layout, Tensor, Tensor]:
        """How this rank's tokens attend, those tokens, and their positions."""
        ...

    def share(self, count: int) -> slice:
        """Which of `count` states this rank reads."""
        ...

    def states(self, hidden: Tensor, at: Tensor) -> Tensor:
        """This rank's share of the states of tokens `at` of the forest, from what each rank's pass came to."""
        ...

    def whole(self, values: Tensor, count: int) -> Tensor:
        """float32[count]: every rank's share, on each."""
        ...


@dataclass(frozen=True, slots=True)
class _ScalarHead:
    """A linear map from hidden states to a number, float32, that belongs to one adapter."""

    name: str  # prefix of its tensors in the adapter's file: NAME.weight, NAME.bias
    module: nn.Linear

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"{self.name}.{key}": parameter for key, parameter in self.module.named_parameters()}


class Policy:
    """A base model with adapters. Every call names the adapter that it means; None is the base alone.

    Attributes:
        trained: the adapter that the optimizer updates.
        tokenizer, device, dtype: of the base.
        altered: why the base's weights are not its own at present ("adapter 'policy' is folded into them"), or None.
            Whoever writes into them sets it, and nothing reads the base by way of the policy until it is None again.
        folds: whether passes round an adapter together with the weights it is added to, as an engine does that folds it
            into the base; set by that engine. Only in half precision, and not for adapters with a scalar head, which
            no engine samples from.
        sequence: what splits training and scoring passes over ranks; None in one process. The calls that make them are
            then collective, and each rank gets the whole result.
        fingerprint: of a base whose tensors are in parts here, set by whoever took them apart; else None.
    """

    def __init__(
        self, peft: PeftModel, tokenizer: PreTrainedTokenizerBase, *, trained: str, sums: Sums | None = None
    ) -> None:
        """`sums` is the switch of the fused LoRA layers, where they are (`lora.fuse`)."""
        self._peft = peft
        self._sums = sums or Sums()
        self._layers = adapters.layers(peft)
        self._adapter_parameters: dict[str, dict[str, nn.Parameter]] = {}
        self.trained = trained
        self.tokenizer = tokenizer
        base: Any = peft.get_base_model()
        self._base: PreTrainedModel = base
        self._decoder: nn.Module = base.base_model  # the model without its head
        # vLLM runs a model that it lacks by transformers' class, which it changes to compile itself when called.
        base.base_model.do_not_compile = True
        self._head: nn.Module = base.get_output_embeddings()
        self.device: torch.device = next(base.parameters()).device
        self.dtype: torch.dtype = next(base.parameters()).dtype
        self._scalar_heads: dict[str, _ScalarHead] = {}
        self._learning = {trained}
        self._selected: Any = ...  # nothing yet
        self.folds = False
        self.altered: str | None = None
        self.sequence: SplitPasses | None = None
        self.fingerprint: str | None = None
        self.train_mode(False)  # peft makes its dropout layers switched on

    @property
    def peft(self) -> PeftModel:
        """The base with its adapters. Raises InfrastructureError while the base is `altered`."""
        self._check_unaltered()
        return self._peft

    @property
    def config(self) -> Any:
        """The base's transformers configuration."""
        return self._base.config

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a completion: the generation configuration's, and the tokenizer's."""
        declared: Any = getattr(self._base.generation_config, "eos_token_id", None)
        tokenizer: Any = self.tokenizer
        ids = [*(declared if isinstance(declared, list) else [declared]), tokenizer.eos_token_id]
        return frozenset(token for token in ids if token is not None)

    def hidden(self, layout: attention.Layout, tokens: Tensor, positions: Tensor, *, adapter: str | None) -> Tensor:
        """Last hidden states [T, d] of tokens [T] at positions [T], attending as `layout` says."""
        self.select(adapter)
        with self._autocast():
            out = self._decoder(
                input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, layout=layout
            )
        return out.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, d] -> [M, vocab], as the model's own forward pass would give them, or less rounded."""
        self._check_unaltered()
        if self.plain_head:
            weight: Any = self._head.weight
            return linear_logits(hidden.to(weight.dtype), weight)
        with self._autocast():
            out = self._head(hidden)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return out if cap is None else cap * torch.tanh(out / cap)

    def logprobs(
        self,
        forest: Forest,
        *,
        adapter: str | None,
        temperature: float = 1.0,
        entropy: bool = False,
        sum_pi_squared: bool = False,
        anchor: Tensor | None = None,
    ) -> Scores:
        """Log-probabilities of the forest's sampled tokens under `adapter`, at the sampling temperature.

        Differentiable in the adapter's parameters when gradients are enabled. Only the states that predict a sampled
        token reach the head, and one that several samples share does so once. With `anchor`, the `states` of a
        reference, also the exact KL from it (a plain head only).
        """
        states = self.states(forest, adapter=adapter)
        distinct, inverse = forest.distinct()
        targets = forest.tokens[distinct if self.sequence is None else distinct[self.sequence.share(len(distinct))]]
        wanted: dict[str, Any] = {
            "temperature": temperature or 1.0,  # greedy rollouts are scored at temperature 1
            "entropy": entropy,
            "squares": torch.zeros(len(targets), device=self.device) if sum_pi_squared else None,
        }
        if self.plain_head:
            weight: Any = self._head.weight
            found = linear_logprobs(states.to(weight.dtype), weight, targets, **wanted)
        else:
            vocabulary = self.config.get_text_config().vocab_size
            found = head_logprobs(states, self.logits, targets, vocabulary=vocabulary, **wanted)
        kl = None
        if anchor is not None:
            weight = self._head.weight
            kl = linear_kl(states.to(weight.dtype), anchor.to(weight.dtype), weight, temperature=wanted["temperature"])
        logprobs, *others = (
            None if x is None else self._whole(x, len(distinct))[inverse] for x in (*found, wanted["squares"], kl)
        )
        assert logprobs is not None
        return Scores(logprobs, *others)

    def states(self, forest: Forest, *, adapter: str | None) -> Tensor:
        """[U, d]: the last hidden states that predict the distinct sampled tokens (see `Forest.distinct`). Where ranks
        split the pass, this one's share of them."""
        return self._states_at(forest, forest.previous[forest.distinct()[0]], adapter)

    def scalars(self, forest: Forest, at: Tensor, *, adapter: str) -> Tensor:
        """What the adapter's scalar head reads off the hidden states of tokens `at`: int64[K] -> float32[K].

        A critic's value of the state before a sampled token is read at the token before it,
        `forest.previous[forest.sampled]`, like the log-probability; a reward model's score at an answer's last token.
        """
        states = self._states_at(forest, at, adapter)
        return self._whole(self._scalar_heads[adapter].module(states.float()).squeeze(-1), len(at))

    @property
    def plain_head(self) -> bool:
        """Whether the head is one frozen matrix, the same for every adapter."""
        return (
            type(self._head) is nn.Linear
            and self._head.bias is None
            and not self._head.weight.requires_grad
            and getattr(self.config, "final_logit_softcapping", None) is None
        )

    def select(self, adapter: str | None) -> None:
        """Makes `adapter` the one that the layers apply. Only adapters that learn ever require gradients."""
        tuner: Any = self.peft.base_model  # every pass over the base comes by here
        self._sums.in_weights = self.folds and self.dtype != torch.float32 and adapter not in self._scalar_heads
        if adapter == self._selected:
            return
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            if adapter not in self._peft.peft_config:
                raise ValueError(f"no adapter {adapter!r}; there are {sorted(self._peft.peft_config)}")
            tuner.enable_adapter_layers()
            tuner.set_adapter(adapter, inference_mode=adapter not in self._learning)
        self._selected = adapter

    def train_mode(self, on: bool) -> None:
        """Switches the adapters' dropout; the base stays in evaluation mode for good."""
        for layer in self._layers:
            for dropout in getattr(layer, "lora_dropout", {}).values():
                dropout.train(on)

    def parameters(self, adapter: str) -> dict[str, nn.Parameter]:
        """The adapter's float32 masters under peft's file names, sorted by name; its scalar head's come last."""
        if adapter not in self._adapter_parameters:  # peft walks the whole model for them
            self._adapter_parameters[adapter] = adapters.parameters(self._peft, adapter)
        found = self._adapter_parameters[adapter]
        return found | self._scalar_heads[adapter].parameters() if adapter in self._scalar_heads else found

    def adapter_tensors(self, adapter: str) -> dict[str, Tensor]:
        """A copy of the adapter on the CPU, as peft's `adapter_model.safetensors` holds it."""
        found = self.parameters(adapter)
        return {name: parameter.detach().to("cpu", copy=True).contiguous() for name, parameter in found.items()}

    def adapter_config(self, adapter: str) -> dict[str, Any]:
        """What goes into peft's `adapter_config.json`."""
        return adapters.config_dict(self._peft, adapter)

    def load_adapter(self, adapter: str, tensors: dict[str, Tensor], origin: str) -> None:
        """Replaces the values of `adapter`; `origin` names the source in errors. Raises UserError on any mismatch."""
        head = self._scalar_heads[adapter].parameters() if adapter in self._scalar_heads else {}
        for name, parameter in head.items():
            if name not in tensors or tensors[name].shape != parameter.shape:
                raise UserError(f"{origin} holds no {name!r} of {parameter.numel()} values: it is no such adapter.")
        self._adapter_parameters.clear()
        adapters.load_tensors(self._peft, adapter, {k: v for k, v in tensors.items() if k not in head}, origin)
        for name, parameter in head.items():
            parameter.data.copy_(tensors[name])

    def scaling(self, adapter: str) -> dict[str, float]:
        """alpha / rank (or what the adapter's configuration makes of it) of each adapted module of the base."""
        return adapters.scaling(self._peft, adapter)

    def lora_config(self, adapter: str) -> LoraConfig:
        config = self._peft.peft_config[adapter]
        assert isinstance(config, LoraConfig)
        return config

    def add_adapter(self, name: str, lora: LoraConfig, *, seed: int, learns: bool) -> None:
        """Adds a fresh adapter beside the others; its initial values depend on `seed` and `name` alone."""
        adapters.add(self.peft, name, lora, seed)
        self._layers = adapters.layers(self._peft)
        self.train_mode(False)
        self._learning |= {name} if learns else set()
        self._selected = ...
        self._adapter_parameters.clear()

    def add_scalar_head(self, adapter: str, name: str) -> None:
        """Gives `adapter` a head for `scalars`, which says 0 of everything until it learns."""
        head = nn.Linear(self.config.get_text_config().hidden_size, 1, device=self.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self._scalar_heads[adapter] = _ScalarHead(name, head)

    def freeze_copy(self, source: str, name: str) -> None:
        """Adds `name`, a frozen copy of adapter `source` as it is now."""
        adapters.attach_copy(self.peft, source, name)
        self._layers = adapters.layers(self._peft)
        self.train_mode(False)
        self._selected = ...
        self._adapter_parameters.clear()

    def checksum(self, adapter: str) -> str:
        """Of the adapter's present values."""
        return checksum({name: value.data for name, value in self.parameters(adapter).items()})

    def base_checksum(self) -> str:
        """Of every byte of the base, which must be whole here."""
        if self.fingerprint is not None:
            raise ValueError("the base is in parts here; compare fingerprints")
        return checksum(self.base_tensors())

    def base_tensors(self) -> dict[str, Tensor]:
        """The base's frozen weights under its own names, sorted; adapters are left out."""
        named = self.peft.get_base_model().named_parameters()
        found = {_WRAPPED.sub("", name): value.detach() for name, value in named if not _LEARNED.search(name)}
        return dict(sorted(found.items()))

    def base_fingerprint(self) -> str:
        """Tells bases apart without reading them whole: names, shapes and the ends of every frozen tensor."""
        return fingerprint(self.base_tensors()) if self.fingerprint is None else self.fingerprint

    def check_packing(self) -> None:
        """Compares a packed pass with transformers' own attention once, at start-up.

        Raises:
            UserError: the architecture does something in its attention that the packed path does not see.
        """
        generator = torch.Generator().manual_seed(0)
        vocabulary = self.config.get_text_config().vocab_size
        tokens = torch.randint(0, vocabulary, (24,), generator=generator).to(self.device)
        order = torch.arange(24, device=self.device)
        forest = Forest(
            tokens=tokens[torch.cat([order[:16], order[8:16], order[16:]])],
            positions=torch.cat([order[:16], order[8:]]),
            segments=torch.tensor([0, 8, 16, 32], dtype=torch.int32),
            parent=torch.tensor([-1, 0, 0], dtype=torch.int32),
            previous=order.new_zeros(32),
            sampled=order[:0],
        )
        with torch.no_grad():
            packed = self.hidden(attention.ForestAttention(forest), forest.tokens, forest.positions, adapter=None)[16:]
            own = self._own_hidden(tokens, "eager")[8:]
            error = _relative(packed, own)
            bound = 1e-3 if self.dtype == torch.float32 else 5e-2
            if not error < bound and self.dtype != torch.float32:
                # Rounding grows with depth: what two of transformers' own attentions differ by is no fault of ours.
                bound = max(bound, min(_NOISE * _relative(self._own_hidden(tokens, "sdpa")[8:], own), _DIFFERENT))
        if not error < bound:
            raise UserError(
                f"{type(self._base).__name__}: packed attention is off from the model's own by {error:.1e} (relative); "
                "this architecture is not supported."
            )

    def _own_hidden(self, tokens: Tensor, implementation: str) -> Tensor:
        """Last hidden states [T, d] by one of transformers' own attentions."""
        self._base.set_attn_implementation(implementation)
        try:
            return self._decoder(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        finally:
            self._base.set_attn_implementation(attention.NAME)

    def _states_at(self, forest: Forest, at: Tensor, adapter: str | None) -> Tensor:
        if self.sequence is None:
            layout = attention.ForestAttention(forest)
            return self.hidden(layout, forest.tokens, forest.positions, adapter=adapter)[at]
        layout, tokens, positions = self.sequence.split(forest)
        return self.sequence.states(self.hidden(layout, tokens, positions, adapter=adapter), at)

    def _whole(self, values: Tensor, count: int) -> Tensor:
        return values if self.sequence is None else self.sequence.whole(values, count)

    def _check_unaltered(self) -> None:
        if self.altered:
            raise InfrastructureError(f"the base can't be read: {self.altered}.")

    def _autocast(self) -> Any:
        """Products in the base's dtype while the adapters' masters stay float32."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return float((found.float() - expected.float()).abs().max() / expected.float().abs().max())

"""A decoder's shape: what its configuration says about sizes, before a weight exists."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lorl.errors import UserError, nearest

Input = Literal["attention_norm", "attention", "ffn_norm", "product"]


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear layer of a decoder layer."""

    name: str  # as in the checkpoint, below `model.layers.N.`
    inputs: int
    outputs: int
    bias: bool
    reads: Input  # which of the layer's activations is its input

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + (self.outputs if self.bias else 0)

    @property
    def splits_outputs(self) -> bool:
        """Whether tensor parallelism gives each rank some of the outputs; else each has some of the inputs."""
        return self.reads in ("attention_norm", "ffn_norm")


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder with grouped-query attention and a gated feed-forward block."""

    model_type: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the head is the embedding
    capped: bool  # logits are soft-capped: the head runs by recomputation
    norms: int  # of the hidden states, in a layer
    qk_norm: bool
    projections: tuple[Projection, ...]

    @classmethod
    def of(cls, config: Any) -> "Shape":
        """From a transformers configuration, or from the mapping in a `config.json`.

        Raises:
            UserError: a mixture of experts, or a configuration without the sizes of a decoder.
        """
        fields = dict(config) if isinstance(config, Mapping) else _attributes(config)
        fields = fields.get("text_config") or fields
        model_type = str(fields.get("model_type", "unknown"))
        if _experts(fields):
            raise UserError(
                f"model_type={model_type} is a mixture of experts, which lorl does not plan; use a dense one"
            )
        sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [name for name in sizes if not isinstance(fields.get(name), int)]:
            raise UserError(f"the model's configuration has no {missing[0]}: it is no decoder that lorl can plan")
        hidden, ffn, layers, heads = (fields[name] for name in sizes)
        kv_heads = fields.get("num_key_value_heads") or heads
        head_dim = fields.get("head_dim") or hidden // heads
        return cls(
            model_type=model_type,
            hidden=hidden,
            ffn=ffn,
            layers=layers,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            vocabulary=fields.get("vocab_size") or 0,
            tied=bool(fields.get("tie_word_embeddings", model_type.startswith(("gemma", "smollm3")))),
            capped=fields.get("final_logit_softcapping") is not None,
            norms=4 if model_type.startswith(("gemma2", "gemma3")) else 2,
            qk_norm=model_type in ("qwen3", "gemma3_text", "gemma3"),
            projections=_projections(model_type, fields, hidden, ffn, heads * head_dim, kv_heads * head_dim),
        )

    @property
    def queries(self) -> int:
        """Width of all heads' queries."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all heads' keys; the values' too."""
        return self.kv_heads * self.head_dim

    @property
    def linear_parameters(self) -> int:
        """Of one layer's linear layers: each is a multiplication and a sum a token."""
        return sum(one.parameters for one in self.projections)

    @property
    def layer_tensors(self) -> list[tuple[int, int]]:
        """Rows and columns of each parameter of one layer; a vector is one column."""
        linear = [(one.outputs, one.inputs) for one in self.projections]
        vectors = [one.outputs for one in self.projections if one.bias] + [self.hidden] * self.norms
        vectors += [self.head_dim] * (2 if self.qk_norm else 0)
        return linear + [(length, 1) for length in vectors]

    @property
    def layer_parameters(self) -> int:
        return sum(rows * columns for rows, columns in self.layer_tensors)

    @property
    def embedding_parameters(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Of the whole model, tied ones once."""
        ends = self.embedding_parameters * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + ends


KNOWN_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "phi3", "smollm3")
"""Types whose parameters are counted exactly; any other is taken for a llama of its sizes."""


_FIELDS = (
    "model_type",
    "text_config",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "final_logit_softcapping",
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
)


def find_shape(path: str) -> Shape:
    """The shape of `model.path`: a folder with a config.json, a fetched model, or a well-known model by name.

    Hub ids are known by their last part: `Qwen/Qwen2.5-72B-Instruct` is `qwen2.5-72b`.

    Raises:
        UserError: none of these, with the nearest name.
    """
    if (folder := find_folder(path)) is not None:
        return Shape.of(_read(folder / "config.json"))
    name = path.rsplit("/", 1)[-1].lower()
    for suffix in ("", "-instruct", "-it", "-base", "-chat"):
        if (known := BUILT_IN.get(name.removesuffix(suffix))) is not None:
            return Shape.of(known)
    raise UserError(
        f"model.path={path} is no folder with a config.json, and no model whose shape lorl knows; "
        f"{nearest(name, BUILT_IN)} (a folder that holds nothing but the model's config.json will do)"
    )


def find_folder(path: str) -> Path | None:
    """Where `model.path` lies on this machine, if it does."""
    from lorl.policy.fetch import cache_dir

    places = (Path(path).expanduser(), cache_dir() / "models" / path)
    return next((folder for folder in places if (folder / "config.json").is_file()), None)


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no model configuration")
    return found


def _attributes(config: Any) -> dict[str, Any]:
    found = {name: getattr(config, name, None) for name in _FIELDS}
    if found["text_config"] is not None:
        found["text_config"] = _attributes(found["text_config"])
    return {name: value for name, value in found.items() if value is not None}


def _experts(fields: Mapping[str, Any]) -> int:
    return max(fields.get(name) or 0 for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def _projections(
    model_type: str, fields: Mapping[str, Any], hidden: int, ffn: int, queries: int, keys: int
) -> tuple[Projection, ...]:
    fused = model_type == "phi3"
    bias = bool(fields.get("attention_bias", False))
    qkv, out, mlp = bias or model_type == "qwen2", bias, bool(fields.get("mlp_bias", False))
    if fused:
        first = [Projection("self_attn.qkv_proj", hidden, queries + 2 * keys, qkv, "attention_norm")]
        gates = [Projection("mlp.gate_up_proj", hidden, 2 * ffn, mlp, "ffn_norm")]
    else:
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        first = [Projection(f"self_attn.{name}", hidden, n, qkv, "attention_norm") for name, n in widths.items()]
        gates = [Projection(f"mlp.{name}", hidden, ffn, mlp, "ffn_norm") for name in ("gate_proj", "up_proj")]
    return (
        *first,
        Projection("self_attn.o_proj", queries, hidden, out, "attention"),
        *gates,
        Projection("mlp.down_proj", ffn, hidden, mlp, "product"),
    )


def _named(
    model_type: str,
    hidden: int,
    ffn: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    **more: Any,
) -> dict[str, Any]:
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **more,
    }


BUILT_IN: dict[str, dict[str, Any]] = {
    "smollm2-135m": _named("llama", 576, 1536, 30, 9, 3, 49_152, True),
    "smollm2-360m": _named("llama", 960, 2560, 32, 15, 5, 49_152, True),
    "smollm2-1.7b": _named("llama", 2048, 8192, 24, 32, 32, 49_152, True),
    "qwen2.5-0.5b": _named("qwen2", 896, 4864, 24, 14, 2, 151_936, True),
    "qwen2.5-1.5b": _named("qwen2", 1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2.5-3b": _named("qwen2", 2048, 11_008, 36, 16, 2, 151_936, True),
    "qwen2.5-7b": _named("qwen2", 3584, 18_944, 28, 28, 4, 152_064, False),
    "qwen2.5-14b": _named("qwen2", 5120, 13_824, 48, 40, 8, 152_064, False),
    "qwen2.5-32b": _named("qwen2", 5120, 27_648, 64, 40, 8, 152_064, False),
    "qwen2.5-72b": _named("qwen2", 8192, 29_568, 80, 64, 8, 152_064, False),
    "qwen3-0.6b": _named("qwen3", 1024, 3072, 28, 16, 8, 151_936, True, head_dim=128),
    "qwen3-1.7b": _named("qwen3", 2048, 6144, 28, 16, 8, 151_936, True, head_dim=128),
    "qwen3-4b": _named("qwen3", 2560, 9728, 36, 32, 8, 151_936, True, head_dim=128),
    "qwen3-8b": _named("qwen3", 4096, 12_288, 36, 32, 8, 151_936, False, head_dim=128),
    "qwen3-14b": _named("qwen3", 5120, 17_408, 40, 40, 8, 151_936, False, head_dim=128),
    "qwen3-32b": _named("qwen3", 5120, 25_600, 64, 64, 8, 151_936, False, head_dim=128),
    "llama-3.2-1b": _named("llama", 2048, 8192, 16, 32, 8, 128_256, True, head_dim=64),
    "llama-3.2-3b": _named("llama", 3072, 8192, 28, 24, 8, 128_256, True, head_dim=128),
    "llama-3.1-8b": _named("llama", 4096, 14_336, 32, 32, 8, 128_256, False),
    "llama-3.1-70b": _named("llama", 8192, 28_672, 80, 64, 8, 128_256, False),
    "llama-3.3-70b": _named("llama", 8192, 28_672, 80, 64, 8, 128_256, False),
    "mistral-7b-v0.3": _named("mistral", 4096, 14_336, 32, 32, 8, 32_768, False),
    "gemma-3-270m": _named("gemma3_text", 640, 2048, 18, 4, 1, 262_144, True, head_dim=256),
    "gemma-3-1b": _named("gemma3_text", 1152, 6912, 26, 4, 1, 262_144, True, head_dim=256),
}

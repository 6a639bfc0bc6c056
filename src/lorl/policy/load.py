"""From configuration to a policy in memory."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import UserError
from lorl.plan import footprint
from lorl.plan.lora import Lora
from lorl.plan.shape import Shape
from lorl.policy import adapters, attention, layers, lora, shared_memory
from lorl.policy.fetch import resolve
from lorl.policy.policy import Policy
from lorl.policy.rounding import round_as_kernels
from lorl.seeding import stable_seed

transformers_logging.disable_progress_bar()  # its bars tear the console's own, and fill log files with control codes

TRAINED = "policy"
REFERENCE = "reference"


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer; one without a padding token pads with its end-of-sequence token."""
    path = resolve(config.path, weights=not config.random_weights)
    with _model_errors(config):
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_shape(config: ModelConfig) -> Any:
    """The base's transformers configuration, from before any weight is read."""
    path = resolve(config.path, weights=not config.random_weights)
    with _model_errors(config):
        return AutoConfig.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)


def positions(shape: Any) -> int | None:
    """Tokens, prompt and answer together, that a base of this configuration was made for, scaled rotary embeddings
    taken at their most; None where it does not say."""
    text = shape.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, dict)] or [rope]  # some models: one a layer type
    factor = max(1.0, *(kind.get("factor") or 1.0 for kind in kinds))
    known = getattr(text, "max_position_embeddings", None)
    return None if known is None else int(known * factor)


def weights_path(config: ModelConfig) -> str:
    """`resolve(config.path)`, or its copy in shared memory where `config` asks for one."""
    path = resolve(config.path, weights=not config.random_weights)
    if not config.use_shm or config.random_weights:
        return path
    if not os.path.isdir(path):
        from huggingface_hub import snapshot_download

        with _model_errors(config):
            path = snapshot_download(path, revision=config.revision, allow_patterns=list(shared_memory.WANTED))
    return str(shared_memory.shared(Path(path)))


def load_base(config: ModelConfig) -> PreTrainedModel:
    """The frozen base on its device, with lorl's attention plugged in."""
    path = weights_path(config)
    device = pick_device(config)
    dtype = pick_dtype(config, device)
    with _model_errors(config):
        if config.random_weights:
            return _random_base(config, path, device, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            attn_implementation=attention.NAME,
        )
    model.name_or_path = resolve(config.path)  # adapters are saved with it
    model.requires_grad_(False)
    return model.to(device).eval()


def _random_base(config: ModelConfig, path: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    shape = AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    with torch.random.fork_rng(), device:
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=dtype, attn_implementation=attention.NAME)
    model.requires_grad_(False)
    model = model.to(device).eval()
    fill_random(model)
    return model


def fill_random(
    model: PreTrainedModel, around: Callable[[nn.Parameter], AbstractContextManager[None]] | None = None
) -> None:
    """`draw_random` for every weight of `model`. `around` is entered for each parameter while it is written."""
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            with around(parameter) if around else nullcontext():
                draw_random(name, parameter, model.config)


@torch.no_grad()
def draw_random(name: str, weight: Tensor, config: Any) -> None:
    """Values as before any training, in place: normal matrices, norms of one, biases of zero. What a weight gets
    depends on its name, its shape and its kind of device."""
    if weight.dim() > 1:
        std = getattr(config.get_text_config(), "initializer_range", 0.02)
        weight.normal_(0, std, generator=torch.Generator(weight.device).manual_seed(stable_seed("weight", name)))
    else:
        weight.fill_(0.0 if name.endswith("bias") else 1.0)


def load_policy(
    model: ModelConfig,
    adapter: AdapterConfig,
    *,
    seed: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    base: PreTrainedModel | None = None,
) -> Policy:
    """A policy with its trained adapter (fresh, or the one in `adapter.path`), checked against transformers' own
    forward pass. `base` is given where its weights are another's."""
    base = load_base(model) if base is None else base
    peft = adapters.attach(base, TRAINED, adapter, seed)
    sums = lora.fuse(peft)
    round_as_kernels(base)
    layers.install(
        base,
        compiled=base.device.type == "cuda",
        recompute=model.gradient_checkpointing,
        offload=model.activation_offload,
        kept=kept_bytes(peft),
    )
    policy = Policy(peft, tokenizer or load_tokenizer(model), trained=TRAINED, sums=sums)
    policy.check_packing()
    return policy


def kept_bytes(peft: PeftModel) -> Callable[[int], int] | None:
    """What a training pass over so many tokens, with the adapter that is selected then, keeps for its backward half, as
    the plan counts it. None: the plan does not know such a model."""
    base: Any = peft.get_base_model()
    try:
        shape = Shape.of(base.config)
    except UserError:
        return None
    how = footprint.Pass(base.dtype.itemsize, eager=base.dtype.itemsize != 2, recompute=False)
    tuner: Any = peft.base_model

    @cache
    def counted(name: str) -> Lora:
        lora: Any = peft.peft_config[name]
        return adapters.counted(lora, shape)

    return lambda tokens: footprint.kept_bytes(shape, counted(tuner.active_adapters[0]), tokens, how)


def pick_device(config: ModelConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device=cuda: torch sees no CUDA device here; use model.device=cpu or auto.")
    wanted = config.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def pick_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]


class _model_errors:  # noqa: N801  (reads as a statement)
    """Turns what transformers raises for a path that is no usable model into one sentence."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, UserError) or not isinstance(error, Exception):
            return
        reason = str(error).strip().split("\n", 1)[0][:300]
        raise UserError(
            f"model.path={self._config.path!r} cannot be loaded ({reason}); name a folder with config.json and "
            "safetensors, a hub id this machine can reach, or a model that `lorl model list` shows."
        ) from error

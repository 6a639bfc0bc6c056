"""LoRA adapters by peft: made fresh, read from and written to peft's own folder layout."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lorl.config import AdapterConfig
from lorl.errors import UserError, nearest
from lorl.plan.lora import Lora, lora_at_most, reach
from lorl.plan.shape import Shape
from lorl.seeding import stable_seed

_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # peft takes B A out of the weights
_OTHER = "is a kind of adapter that lorl does not compute"
_OTHER_KINDS: dict[str, tuple[Any, str]] = {  # field of the file -> its value in plain LoRA, and what another does
    "bias": ("none", "trains the base's own biases, and the base is frozen and shared"),
    "layer_replication": (None, "makes another base, of repeated layers"),
    "alora_invocation_tokens": (None, _OTHER),
    "arrow_config": (None, _OTHER),
    "kasa_config": (None, _OTHER),
    "monteclora_config": (None, _OTHER),
    "velora_config": (None, _OTHER),
    "use_bdlora": (None, _OTHER),
    "use_qalora": (False, _OTHER),
}


def attach(model: PreTrainedModel, name: str, config: AdapterConfig, seed: int) -> PeftModel:
    """Wraps the frozen base with its first adapter: fresh, or the one in `config.path`.

    A fresh adapter's initial values depend on `seed` and `name` alone; the global generator is left as it was.
    """
    lora = configured(config)
    _check_targets(model, lora)
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed(seed, "adapter", name))
        try:
            peft = get_peft_model(model, lora, adapter_name=name)
        except ValueError as error:  # what else peft refuses, in its words
            raise UserError(f"adapter: {_first_sentence(error)}") from None
    assert isinstance(peft, PeftModel)
    _place(peft, name)
    if config.path:
        load_tensors(peft, name, read_tensors(Path(config.path)), str(config.path))
    return peft


def configured(config: AdapterConfig) -> LoraConfig:
    """What `attach` will make: the configuration in `config.path`, or the one that the keys describe."""
    return read_config(Path(config.path)) if config.path else _fresh_config(config)


def counted(lora: LoraConfig, shape: Shape) -> Lora:
    """As the plan counts it: with its largest rank everywhere, and on all linear layers where it reaches modules that
    are in no layer."""
    return lora_at_most(shape, *reach(vars(lora)))


def attach_copy(peft: PeftModel, source: str, name: str) -> None:
    """Adds a frozen copy of adapter `source` under `name`."""
    tensors = {key: value.clone() for key, value in get_peft_model_state_dict(peft, adapter_name=source).items()}
    peft.add_adapter(name, LoraConfig(**_config_fields(peft.peft_config[source].to_dict())))
    _place(peft, name)
    load_tensors(peft, name, tensors, f"adapter {source!r}")


def add(peft: PeftModel, name: str, lora: LoraConfig, seed: int) -> None:
    """Adds a fresh adapter beside those that `peft` has; its values depend on `seed` and `name` alone.

    Raises:
        UserError: it fits the base nowhere, or its name is part of a tensor's: peft takes such tensors for this
            adapter's when it reads another one's, and leaves them out.
    """
    _check_targets(peft.get_base_model(), lora)
    if name not in peft.peft_config and name in {part for key, _ in peft.named_parameters() for part in key.split(".")}:
        raise UserError(
            f"adapter {name!r}: this model has modules or tensors of that name, and peft could not tell them from the "
            f"adapter; use another name, such as {name + '-adapter'!r}"
        )
    with torch.random.fork_rng():
        torch.manual_seed(stable_seed(seed, "adapter", name))
        try:
            peft.add_adapter(name, lora)
        except ValueError as error:  # what else peft refuses, in its words
            raise UserError(f"adapter {name!r}: {_first_sentence(error)}") from None
    _place(peft, name)


def like(lora: LoraConfig, *, rank: int | None, alpha: float | None, targets: str | list[str] | None) -> LoraConfig:
    """A configuration as `lora`, but for what is given."""
    fields = _config_fields(lora.to_dict())
    if rank is not None:
        fields |= {"r": rank, "rank_pattern": {}}
    if alpha is not None:
        fields |= {"lora_alpha": alpha, "alpha_pattern": {}}
    if targets is not None:
        fields |= {"target_modules": targets}
    return LoraConfig(**fields)


def layers(peft: PeftModel) -> list[BaseTunerLayer]:
    return [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]


def scaling(peft: PeftModel, name: str) -> dict[str, float]:
    """The factor of B A in each layer that adapter `name` adapts, by the layer's name in the base."""
    named: Any = peft.get_base_model().named_modules()
    factors = ((module, getattr(layer, "scaling", {})) for module, layer in named if isinstance(layer, BaseTunerLayer))
    return {module: float(scaling[name]) for module, scaling in factors if name in scaling}


def parameters(peft: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """The adapter's own tensors under peft's file names, sorted; the parameters themselves, not copies."""
    state = get_peft_model_state_dict(peft, adapter_name=name)
    by_pointer = {parameter.data_ptr(): parameter for parameter in peft.parameters()}
    return {key: by_pointer[state[key].data_ptr()] for key in sorted(state)}


def load_tensors(peft: PeftModel, name: str, tensors: dict[str, Tensor], origin: str) -> None:
    """Copies `tensors` (peft's file names) into adapter `name`.

    Raises:
        UserError: a tensor is missing, unknown or of another shape: the adapter belongs to another base.
    """
    own = get_peft_model_state_dict(peft, adapter_name=name)
    if missing := sorted(own.keys() - tensors.keys()):
        raise UserError(f"{origin}: no tensor {missing[0]!r} ({len(missing)} missing); was it made for another base?")
    if unknown := sorted(tensors.keys() - own.keys()):
        raise UserError(
            f"{origin}: tensor {unknown[0]!r} binds to nothing in this base ({len(unknown)} such); "
            f"{nearest(unknown[0], own)}"
        )
    for key, value in own.items():
        if tensors[key].shape != value.shape:
            raise UserError(
                f"{origin}: tensor {key!r} has shape {tuple(tensors[key].shape)}, this base needs {tuple(value.shape)};"
                " the adapter belongs to another base."
            )
        if not bool(torch.isfinite(tensors[key]).all()):
            raise UserError(f"{origin}: tensor {key!r} holds values that are not finite.")
    set_peft_model_state_dict(peft, tensors, adapter_name=name)


def read_config(folder: Path, key: str = "adapter.path") -> LoraConfig:
    """The `adapter_config.json` of a peft folder as a trainable LoraConfig; `key` is what named it, for messages."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{key}={str(folder)!r} holds no adapter_config.json; name a folder that peft saved.")
    try:
        raw = json.loads(path.read_text())
        if raw.get("peft_type") != "LORA":
            raise UserError(f"{path}: peft_type is {raw.get('peft_type')!r}; lorl trains LORA adapters.")
        _check_kind(raw, path)
        return LoraConfig(**_config_fields(raw))
    except (json.JSONDecodeError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is not a peft adapter configuration: {_first_sentence(error)}") from None


def read_tensors(folder: Path, key: str = "adapter.path") -> dict[str, Tensor]:
    """The tensors of a peft folder, from safetensors only (a pickled adapter_model.bin could run code)."""
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        raise UserError(f"{key}={str(folder)!r} holds no adapter_model.safetensors; save it with peft >= 0.5.")
    try:
        return load_file(str(path))
    except Exception as error:  # safetensors' own error type is not exported; whatever it says, the file is unreadable
        raise UserError(f"{path} cannot be read: {_first_sentence(error)}") from None


def config_dict(peft: PeftModel, name: str) -> dict[str, Any]:
    """The adapter's configuration as peft writes it to `adapter_config.json`, in a stable order."""
    raw = peft.peft_config[name].to_dict()
    raw["inference_mode"] = True
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(raw.items())}


def _place(peft: PeftModel, name: str) -> None:
    """Moves adapter `name` to where the base computes: peft puts it beside weights, which may lie in host memory."""
    device = next(peft.get_base_model().parameters()).device
    for key, parameter in peft.named_parameters():
        if "lora_" in key and f".{name}." in key and parameter.device != device:
            parameter.data = parameter.data.to(device)


def _fresh_config(config: AdapterConfig) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # peft says int and divides by rank: a float is as good
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        use_rslora=config.rslora,
        use_dora=config.dora,
    )


def _config_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments from a saved configuration; keys of a newer peft are left out, as peft does. The base's
    name is peft's to fill in: the adapter's tensors tell whether it fits, and a copy in another folder does."""
    known = LoraConfig.__dataclass_fields__
    given = {key: value for key, value in raw.items() if key in known}
    return given | {"inference_mode": False, "base_model_name_or_path": None}


def _check_kind(raw: dict[str, Any], path: Path) -> None:
    """Refuses what peft would change the base for, which is frozen and shared, and what computes no LoRA."""
    init = raw.get("init_lora_weights")
    if isinstance(init, str) and init.startswith(_INITS_THAT_CHANGE_THE_BASE):
        raise UserError(
            f"{path}: init_lora_weights={init!r} changes the base's weights, and lorl's are frozen; have peft save it "
            "as plain LoRA, with save_pretrained(..., path_initial_model_for_weight_conversion=FOLDER)."
        )
    for field, (plain, what) in _OTHER_KINDS.items():
        if (value := raw.get(field)) and value != plain:
            raise UserError(f"{path}: {field}={value!r} {what}; make the adapter with {field}={plain!r}.")


def _check_targets(model: nn.Module, lora: LoraConfig) -> None:
    """Every named target and exclusion must match a module: peft only complains when none does."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]  # other adapters may be there
    leaves = {name.rsplit(".", 1)[-1] for name in names}
    for field in ("target_modules", "exclude_modules"):
        wanted = getattr(lora, field)
        if isinstance(wanted, str) and wanted != "all-linear":
            try:
                pattern = re.compile(wanted)
            except re.error as error:
                raise UserError(f"adapter.{field}={wanted!r} is not a regular expression: {error}") from None
            if not any(pattern.fullmatch(name) for name in names) and wanted not in leaves:
                raise UserError(f"adapter.{field}={wanted!r} matches no linear layer; {nearest(wanted, leaves)}")
        for one in [] if wanted is None or isinstance(wanted, str) else wanted:
            if not any(name == one or name.endswith("." + one) for name in names):
                raise UserError(f"adapter.{field}: no linear layer is called {one!r}; {nearest(one, leaves)}")


def _first_sentence(error: BaseException) -> str:
    return str(error).split("\n", 1)[0][:300]

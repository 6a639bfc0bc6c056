"""What the plan counts from a configuration is what transformers and peft make of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config

from lorl.errors import UserError
from lorl.plan.lora import lora_in, lora_on
from lorl.plan.shape import BUILT_IN, KNOWN_TYPES, Shape, find_shape

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": False,
}


def empty(model_type: str, **fields: Any) -> Any:
    """The model on the meta device, and its configuration."""
    if model_type == "phi3":
        fields = {name: value for name, value in fields.items() if name != "head_dim"}
        config = Phi3Config(**fields, pad_token_id=0)
    else:
        config = AutoConfig.for_model(model_type, **fields, pad_token_id=0)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", KNOWN_TYPES)
def test_parameters_are_those_of_the_model(model_type: str, tied: bool) -> None:
    model = empty(model_type, **(SIZES | {"tie_word_embeddings": tied}))
    shape = Shape.of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert Shape.of(json.loads(model.config.to_json_string(use_diff=False))) == shape


@pytest.mark.parametrize("bias", ["attention_bias", "mlp_bias"])
def test_biases_are_counted(bias: str) -> None:
    model = empty("llama", **SIZES, **{bias: True})
    assert Shape.of(model.config).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),  # of the published checkpoints
    [
        ("smollm2-135m", 134_515_008),
        ("qwen2.5-1.5b", 1_543_714_304),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen2.5-72b", 72_706_203_648),
        ("qwen3-8b", 8_190_735_360),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("gemma-3-270m", 268_098_176),
        ("gemma-3-1b", 999_885_952),
    ],
)
def test_well_known_models(name: str, parameters: int) -> None:
    assert find_shape(name).parameters == parameters


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "v_proj"], r"model\.layers\.[01]\.mlp\.(up|down)_proj"], ids=str
)
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3"])
def test_adapters_are_as_large_as_pefts(model_type: str, targets: str | list[str]) -> None:
    if model_type == "phi3" and targets != "all-linear":
        targets = ["qkv_proj", "down_proj"]
    model = empty(model_type, **SIZES)
    shape = Shape.of(model.config)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    expected = sum(p.numel() for name, p in peft.named_parameters() if "lora_" in name)
    assert lora_on(shape, 4, targets).parameters == expected


def test_an_adapter_folder_says_its_own_size(tmp_path: Path) -> None:
    shape = find_shape("qwen2.5-0.5b")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 16, "target_modules": ["q_proj"]}))
    assert lora_in(shape, str(tmp_path)) == lora_on(shape, 16, ["q_proj"])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        lora_in(shape, str(tmp_path))


def test_a_model_is_found_by_folder_by_name_and_by_hub_id(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BUILT_IN["qwen2.5-7b"]))
    assert find_shape(str(tmp_path)) == find_shape("qwen2.5-7b") == find_shape("Qwen/Qwen2.5-7B-Instruct")


def test_a_text_model_inside_another_is_what_counts() -> None:
    inner = BUILT_IN["gemma-3-1b"]
    assert Shape.of({"model_type": "gemma3", "text_config": inner}) == Shape.of(inner)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("not json", "cannot be read"),
        ("[1]", "holds no model configuration"),
        ('{"model_type": "bert"}', "has no hidden_size"),
        (json.dumps(BUILT_IN["qwen2.5-7b"] | {"num_experts": 8}), "mixture of experts"),
    ],
)
def test_configurations_that_are_no_dense_decoders(tmp_path: Path, config: str, said: str) -> None:
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=said):
        find_shape(str(tmp_path))


def test_what_nobody_knows_is_said_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"did you mean 'qwen2\.5-72b'"):
        find_shape("qwen2.5-72")
    with pytest.raises(UserError, match=r"no linear layer is called 'query_proj'; did you mean"):
        lora_on(find_shape("qwen2.5-7b"), 8, ["query_proj"])
    with pytest.raises(UserError, match="matches no linear layer"):
        lora_on(find_shape("qwen2.5-7b"), 8, "nothing")

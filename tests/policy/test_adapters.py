"""Adapters beside each other on one base."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM

from conftest import tiny_tokenizer
from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import UserError
from lorl.policy import adapters
from lorl.policy.load import load_base
from lorl.policy.policy import Policy


@pytest.mark.parametrize("name", ["self_attn", "model", "0", "lora_A", "weight"])
def test_an_adapter_cannot_have_the_name_of_what_the_base_is_made_of(name: str, tiny_model: Path) -> None:
    config = AdapterConfig(rank=4)
    peft = adapters.attach(load_base(ModelConfig(path=str(tiny_model), device="cpu")), "first", config, seed=0)
    before = get_peft_model_state_dict(peft, adapter_name="first").keys()
    with pytest.raises(UserError, match=rf"adapter '{name}': .*such as '{name}-adapter'"):
        adapters.add(peft, name, adapters.configured(config), seed=0)
    adapters.add(peft, f"{name}-adapter", adapters.configured(config), seed=0)
    assert get_peft_model_state_dict(peft, adapter_name="first").keys() == before


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head", "norm"]}, {"trainable_token_indices": [3, 4]}])
def test_the_base_is_the_same_under_every_kind_of_adapter(
    more: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """A checkpoint knows its base by it: what an adapter holds besides LoRA's factors is no part of the base."""
    plain = Policy(_attached(tiny_model, AdapterConfig(rank=4)), tiny_tokenizer(), trained="policy")
    lora = LoraConfig(r=4, target_modules=["q_proj"], **more)
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), lora).save_pretrained(tmp_path / "theirs")
    theirs = Policy(
        _attached(tiny_model, AdapterConfig(path=str(tmp_path / "theirs"))), tiny_tokenizer(), trained="policy"
    )
    with torch.no_grad():
        for parameter in theirs.parameters("policy").values():
            parameter.add_(1)
    assert theirs.base_checksum() == plain.base_checksum()
    assert theirs.base_fingerprint() == plain.base_fingerprint()


def _attached(model: Path, config: AdapterConfig) -> PeftModel:
    return adapters.attach(load_base(ModelConfig(path=str(model), device="cpu")), "policy", config, seed=0)


def test_peft_loses_tensors_by_such_a_name(tiny_model: Path) -> None:
    """Why it is refused. Where this fails, peft has learnt to tell them apart, and the refusal can go."""
    config = AdapterConfig(rank=4)
    peft = adapters.attach(load_base(ModelConfig(path=str(tiny_model), device="cpu")), "first", config, seed=0)
    before = len(get_peft_model_state_dict(peft, adapter_name="first"))
    peft.add_adapter("self_attn", adapters.configured(config))
    assert len(get_peft_model_state_dict(peft, adapter_name="first")) < before

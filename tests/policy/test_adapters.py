"""Adapters beside each other on one base."""

from pathlib import Path

import pytest
from peft import get_peft_model_state_dict

from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import UserError
from lorl.policy import adapters
from lorl.policy.load import load_base


@pytest.mark.parametrize("name", ["self_attn", "model", "0", "lora_A", "weight"])
def test_an_adapter_cannot_have_the_name_of_what_the_base_is_made_of(name: str, tiny_model: Path) -> None:
    config = AdapterConfig(rank=4)
    peft = adapters.attach(load_base(ModelConfig(path=str(tiny_model), device="cpu")), "first", config, seed=0)
    before = get_peft_model_state_dict(peft, adapter_name="first").keys()
    with pytest.raises(UserError, match=rf"adapter '{name}': .*such as '{name}-adapter'"):
        adapters.add(peft, name, adapters.configured(config), seed=0)
    adapters.add(peft, f"{name}-adapter", adapters.configured(config), seed=0)
    assert get_peft_model_state_dict(peft, adapter_name="first").keys() == before


def test_peft_loses_tensors_by_such_a_name(tiny_model: Path) -> None:
    """Why it is refused. Where this fails, peft has learnt to tell them apart, and the refusal can go."""
    config = AdapterConfig(rank=4)
    peft = adapters.attach(load_base(ModelConfig(path=str(tiny_model), device="cpu")), "first", config, seed=0)
    before = len(get_peft_model_state_dict(peft, adapter_name="first"))
    peft.add_adapter("self_attn", adapters.configured(config))
    assert len(get_peft_model_state_dict(peft, adapter_name="first")) < before

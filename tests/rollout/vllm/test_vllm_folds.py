"""The trainer rounds as an engine that folds; and a fold wants room."""

from pathlib import Path

import pytest

from lorl.plan.memory import Memory
from lorl.policy.load import TRAINED
from lorl.rollout.engine import Sampling
from vllm_engines import distance, draw, needs_vllm, opened, run, save_model

pytestmark = needs_vllm

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}


def test_folded_rollouts_are_scored_by_the_folded_weights(tmp_path: Path) -> None:
    """In bfloat16 the two are as close as two implementations of the base are to each other."""
    model = save_model(tmp_path / "llama", num_hidden_layers=4, initializer_range=0.05, **SHAPE)
    sampling = Sampling(max_tokens=48, ignore_eos=True)
    with opened(model, "model.dtype=bfloat16", "rollout.adapter_mode=fold") as found:
        noise = distance(found.policy, run(found.engine, None, sampling, n=4, count=5), None)
        for version in range(1, 4):
            draw(found.policy, version, std=0.02)
            found.publish(version=version)
            answers = run(found.engine, TRAINED, sampling, n=4, count=5)
            assert distance(found.policy, answers, TRAINED) < 1.15 * noise
            found.policy.folds = False  # as if the adapter had been added beside the base
            assert distance(found.policy, answers, TRAINED) > 1.25 * noise
            found.policy.folds = True


def test_auto_does_not_fold_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "can_fold", False)
    with opened(save_model(tmp_path / "llama"), "rollout.adapter_mode=auto") as found:
        assert not found.engine.folds
        assert "rollout.adapter_mode=adapter: what a fold takes has no room beside the KV cache" in found.told

"""In bfloat16 the trainer is as close to an engine that folds as two implementations of the base are to each other."""

from pathlib import Path

from lorl.policy.load import TRAINED
from lorl.rollout.engine import Sampling
from vllm_engines import distance, draw, needs_vllm, opened, run, save_model

pytestmark = needs_vllm

SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 512}


def test_folded_rollouts_are_scored_by_the_folded_weights(tmp_path: Path) -> None:
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

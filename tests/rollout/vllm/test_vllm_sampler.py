"""Samples that vLLM reads again, part by part, after it threw them out: what the parts' ends draw is nobody's."""

from pathlib import Path

import pytest
import torch

from lorl.experience import Outcome, Prompt
from lorl.packing import pack
from lorl.policy.load import TRAINED
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.vllm.sampler import Batch, draw_into
from vllm_engines import draw, needs_vllm, opened, ordered, save_model

pytestmark = needs_vllm


def test_a_draw_that_is_thrown_away_leaves_what_was_recorded() -> None:
    logprobs = torch.full((4, 6), -9.0)
    batch = Batch(
        rows=torch.tensor([2, 0, 1]),
        prompts=torch.tensor([5, 5, 5]),
        lengths=torch.tensor([7, 8, 4], dtype=torch.int32),
        discarded=torch.tensor([False, True, False]),  # the last is within its prompt
        uniforms=torch.full((4, 6), 0.5, dtype=torch.float64),
        logprobs=logprobs,
    )
    tokens = draw_into(torch.zeros(3, 8), batch, Sampling(max_tokens=5))
    assert tokens.shape == (3, 1)
    assert logprobs[2, 2] == pytest.approx(-torch.tensor(8.0).log().item())
    logprobs[2, 2] = -9.0
    assert (logprobs[:3, :5] == -9.0).all()


def test_answers_that_are_read_again_in_parts_keep_their_log_probabilities(tmp_path: Path) -> None:
    with opened(save_model(tmp_path / "llama"), "rollout.max_batched_tokens=32") as found:
        draw(found.policy, 1)
        found.publish()
        pool, block = found.engine.inside.blocks.block_pool, found.engine.inside.block_size
        wanted = [Request(Prompt("long", [7 + i % 90 for i in range(block - 30)], ""), list(range(6)))]
        sampler, within = found.engine._sampler, list[int]()
        batch = sampler._batch

        def watching(count: int) -> Batch:
            made = batch(count)
            within.append(int((made.discarded & (made.lengths > made.prompts)).sum()))
            return made

        sampler._batch = watching
        held = pool.get_new_blocks(pool.get_num_free_blocks() - 5)
        answers = ordered(found.engine.generate(wanted, Sampling(max_tokens=60, ignore_eos=True), adapter=TRAINED))
        pool.free_blocks(held)
        assert sum(within) > 0
        experience = pack(answers, [Outcome("ok", 0.0)] * len(answers))
        with torch.no_grad():
            scores = found.policy.logprobs(experience.forest, adapter=TRAINED).logprobs
        assert (scores - experience.rollout_logprobs).abs().max() < 1e-4

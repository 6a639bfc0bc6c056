"""The embedded engine: what it samples, that it shares prompts, and that its randomness is counted."""

from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion, Outcome, Prompt
from lorl.packing import pack
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy
from lorl.rollout.engine import Request, Sampling
from lorl.rollout.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    return with_adapter(tiny_model)


def with_adapter(folder: Path) -> Policy:
    policy = load_policy(ModelConfig(path=str(folder)), AdapterConfig(rank=4, alpha=8.0), seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy


def prompts(count: int = 5) -> list[Prompt]:
    generator = torch.Generator().manual_seed(4)
    lengths = [3, 17, 9, 1, 30][:count]
    return [
        Prompt(id=f"p{i}", tokens=torch.randint(2, 258, (length,), generator=generator).tolist(), text="")
        for i, length in enumerate(lengths)
    ]


def requests(n: int, count: int = 5) -> list[Request]:
    return [Request(p, [1000 * i + s for s in range(n)]) for i, p in enumerate(prompts(count))]


def run(engine: TorchEngine, wanted: list[Request], sampling: Sampling, adapter: str | None = None) -> list[Completion]:
    found = list(engine.generate(wanted, sampling, adapter=adapter))
    return sorted(found, key=lambda c: (c.prompt.id, c.sample))


def hf_greedy(policy: Policy, prompt: Prompt, adapter: str | None, limit: int) -> list[int]:
    policy.select(adapter)
    policy._base.set_attn_implementation("eager")
    try:
        out = policy._base.generate(
            torch.tensor([prompt.tokens]),
            generation_config=GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=1, pad_token_id=1),
        )
        return out[0, len(prompt.tokens) :].tolist()
    finally:
        policy._base.set_attn_implementation("lorl")


def test_prompts_with_a_common_beginning_are_answered_as_alone(policy: Policy) -> None:
    common = list(range(40, 60))
    shared = [Request(Prompt(f"s{i}", common + p.tokens, ""), [i, i + 50]) for i, p in enumerate(prompts())]
    sampling = Sampling(temperature=1.0, max_tokens=30)
    together = run(TorchEngine(policy), shared, sampling)
    alone = [completion for request in shared for completion in run(TorchEngine(policy), [request], sampling)]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


@pytest.mark.parametrize("adapter", [None, TRAINED])
def test_greedy_equals_transformers_generate_token_for_token(policy: Policy, adapter: str | None) -> None:
    engine = TorchEngine(policy, max_concurrent=3)  # fewer than the requests: they take turns
    engine.publish(TRAINED, 1, policy.checksum(TRAINED))
    found = run(engine, requests(1), Sampling(temperature=0.0, max_tokens=40), adapter)
    for completion, prompt in zip(found, prompts(), strict=True):
        assert completion.tokens == hf_greedy(policy, prompt, adapter, 40)


def test_what_is_sampled_depends_on_the_seed_alone(policy: Policy) -> None:
    sampling = Sampling(temperature=1.0, max_tokens=30)
    whole = run(TorchEngine(policy), requests(4), sampling)
    queued = run(TorchEngine(policy, max_concurrent=4), list(reversed(requests(4))), sampling)
    assert [c.tokens for c in whole] == [c.tokens for c in queued]
    other = run(TorchEngine(policy), [Request(r.prompt, [s + 7 for s in r.seeds]) for r in requests(4)], sampling)
    assert [c.tokens for c in whole] != [c.tokens for c in other]
    assert len({tuple(c.tokens) for c in whole if c.prompt.id == "p1"}) > 1


def test_engine_logprobs_are_the_trainers(policy: Policy) -> None:
    engine = TorchEngine(policy)
    engine.publish(TRAINED, 3, policy.checksum(TRAINED))
    found = run(engine, requests(4), Sampling(temperature=0.8, max_tokens=25), TRAINED)
    assert {c.version for c in found} == {3}
    experience = pack(found, [Outcome("ok", 0.0)] * len(found))
    scores = policy.logprobs(experience.forest, adapter=TRAINED, temperature=0.8).logprobs
    assert (scores - experience.rollout_logprobs).abs().max() < 2e-5


def test_capped_scores_decode_as_they_train(tmp_path: Path) -> None:
    """Gemma 2, with a cap and a window that bind."""
    shape = {"sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0}
    policy = with_adapter(save_tiny_model(tmp_path, "gemma2", **shape))
    test_engine_logprobs_are_the_trainers(policy)
    test_greedy_equals_transformers_generate_token_for_token(policy, TRAINED)


def test_completions_end_at_eos_limit_or_stop_string(policy: Policy) -> None:
    engine = TorchEngine(policy)
    free = run(engine, requests(8), Sampling(max_tokens=60))
    for completion in free:
        assert (completion.finish == "stop") == (completion.tokens[-1] == 1)
        assert len(completion.tokens) == 60 or completion.finish == "stop"
    target = next(c for c in free if len(c.text) > 10)
    stop = target.text[4:6]
    stopped = run(engine, requests(8), Sampling(max_tokens=60, stop=[stop]))
    match = next(c for c in stopped if (c.prompt.id, c.sample) == (target.prompt.id, target.sample))
    assert match.finish == "stop"
    assert match.text == target.text[: target.text.index(stop)]
    assert all(stop not in c.text for c in stopped)


def test_adapter_that_changed_after_publishing_is_refused(policy: Policy) -> None:
    engine = TorchEngine(policy)
    with pytest.raises(InfrastructureError, match="never published"):
        run(engine, requests(1), Sampling(max_tokens=2), TRAINED)
    with pytest.raises(InfrastructureError, match="the trainer published"):
        engine.publish(TRAINED, 1, "0" * 32)
    engine.publish(TRAINED, 1, policy.checksum(TRAINED))
    parameter = next(iter(policy.parameters(TRAINED).values()))
    parameter.data.mul_(1.5)
    try:
        with pytest.raises(InfrastructureError, match="stale"):
            run(engine, requests(1), Sampling(max_tokens=2), TRAINED)
    finally:
        parameter.data.div_(1.5)


def test_cache_too_small_for_a_group_is_said_before_any_work(policy: Policy) -> None:
    engine = TorchEngine(policy, memory_fraction=1e-9)
    with pytest.raises(UserError, match=r"rollout\.memory_fraction"):
        run(engine, requests(2), Sampling(max_tokens=50))

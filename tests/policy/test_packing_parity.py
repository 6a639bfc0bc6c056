"""A packed forest says of every token what its sequence says alone: values and gradients, every supported family."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from conftest import save_tiny_model
from lorl.config import AdapterConfig, ModelConfig
from lorl.experience import Completion, Experience, Outcome, Prompt
from lorl.packing import cut, pack, select
from lorl.policy.load import TRAINED, load_policy
from lorl.policy.policy import Policy

FAMILIES = {
    "llama": {},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 6, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    "phi": {},
    "phi3": {"sliding_window": None},
}


def random_batch(seed: int = 0, groups: int = 3, n: int = 4, prefix: int = 0) -> list[Completion]:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> list[int]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(2, 258, (length,), generator=generator).tolist()

    completions = []
    common = draw(prefix, prefix + 1)
    for group in range(groups):
        prompt = Prompt(id=f"p{group}", tokens=common + draw(5, 20), text="")
        for sample in range(n):
            tokens = draw(1, 12)
            completions.append(Completion(prompt, sample, tokens, [0.0] * len(tokens), "", "stop", 1))
    return completions


def packed(completions: list[Completion]) -> Experience:
    return pack(completions, [Outcome("ok", 1.0)] * len(completions))


def with_random_adapter(policy: Policy) -> Policy:
    """LoRA's B starts at zero; fill it so that the adapter does something."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in policy.parameters(TRAINED).items():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return policy


def load_tiny(folder: Path, **adapter: object) -> Policy:
    config = AdapterConfig(rank=4, alpha=8.0, **adapter)  # type: ignore[arg-type]
    return with_random_adapter(load_policy(ModelConfig(path=str(folder)), config, seed=0))


def separate_logprobs(policy: Policy, completions: list[Completion], temperature: float) -> Tensor:
    """Each sequence in a pass of its own, through transformers' eager attention and a plain log_softmax."""
    model = policy._base
    model.set_attn_implementation("eager")
    try:
        found = []
        for completion in completions:
            tokens = torch.tensor(completion.prompt.tokens + completion.tokens)
            logits = model(input_ids=tokens[None], use_cache=False).logits[0].float() / temperature
            start = len(completion.prompt.tokens)
            log_p = logits[start - 1 : -1].log_softmax(-1)
            found.append(log_p.gather(1, tokens[start:, None]).squeeze(1))
        return torch.cat(found)
    finally:
        model.set_attn_implementation("lorl")


def gradients(policy: Policy, objective: Tensor) -> dict[str, Tensor]:
    parameters = policy.parameters(TRAINED)
    return dict(zip(parameters, torch.autograd.grad(objective, list(parameters.values())), strict=True))


@pytest.mark.parametrize("prefix", [0, 10], ids=["distinct prompts", "shared prefix"])
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_separate_in_value_and_gradient(family: str, prefix: int, tmp_path: Path) -> None:
    policy = load_tiny(save_tiny_model(tmp_path, family, **FAMILIES[family]))
    completions = random_batch(prefix=prefix)
    experience = packed(completions)
    policy.select(TRAINED)
    weights = torch.randn(experience.layout.num_tokens, generator=torch.Generator().manual_seed(2))
    mine = policy.logprobs(experience.forest, adapter=TRAINED, temperature=0.7).logprobs
    theirs = separate_logprobs(policy, completions, 0.7)
    assert (mine - theirs).abs().max() < 2e-5
    mine_g, theirs_g = gradients(policy, mine @ weights), gradients(policy, theirs @ weights)
    scale = max(float(g.abs().max()) for g in theirs_g.values())
    for name in theirs_g:
        assert (mine_g[name] - theirs_g[name]).abs().max() < 2e-5 * scale, name


@pytest.mark.parametrize("prefix", [0, 10])
def test_shared_prompt_equals_a_prompt_for_each_sample(tiny_model: Path, prefix: int) -> None:
    policy = load_tiny(tiny_model)
    completions = random_batch(prefix=prefix)
    together = policy.logprobs(packed(completions).forest, adapter=TRAINED).logprobs
    alone = torch.cat([policy.logprobs(packed([c]).forest, adapter=TRAINED).logprobs for c in completions])
    assert (together - alone).abs().max() < 1e-5
    prompts = {c.prompt.id: len(c.prompt.tokens) - prefix for c in completions}
    expected = prefix + sum(prompts.values()) + sum(len(c.tokens) for c in completions)
    assert packed(completions).forest.tokens.numel() == expected


@pytest.mark.parametrize("prefix", [0, 10])
@pytest.mark.parametrize("budget", [1, 40, 75, 10_000])
def test_any_cut_into_micro_batches_keeps_every_number(tiny_model: Path, budget: int, prefix: int) -> None:
    policy = load_tiny(tiny_model)
    experience = packed(random_batch(prefix=prefix))
    whole = policy.logprobs(experience.forest, adapter=TRAINED).logprobs
    cuts = cut(experience, torch.arange(experience.layout.num_sequences), budget)
    assert torch.cat(cuts).tolist() == list(range(experience.layout.num_sequences))
    for sequences in cuts:
        part = select(experience, sequences)
        mask = torch.isin(experience.layout.sequence, sequences)
        assert (policy.logprobs(part.forest, adapter=TRAINED).logprobs - whole[mask]).abs().max() < 1e-5
        assert part.forest.tokens.numel() <= budget or len(sequences) == 1
    assert len(cuts) == {1: 12, 10_000: 1}.get(budget, len(cuts))


@pytest.mark.parametrize(
    ("prompt", "answer", "budget", "filled"),
    [
        (4, 8, 128, [128, 80]),  # a group of 68 fills half: seven of the next one's eight go beside it
        (32, 8, 192, [192, 96]),  # two groups fit, and the third starts anew
        (64, 8, 200, [128, 128, 128]),  # one more answer beside a group would have its prompt of 64 computed twice
        (4, 8, 20, [20, 20, 20, 20] * 3),  # a group that fits nowhere is spread over as many as it takes
    ],
)
def test_micro_batches_are_filled_with_samples_of_the_next_group(
    prompt: int, answer: int, budget: int, filled: list[int]
) -> None:
    tokens = iter(range(100_000))
    asked = [Prompt(f"p{i}", [next(tokens) for _ in range(prompt)], "") for i in range(3)]
    answers = [[next(tokens) for _ in range(answer)] for _ in range(24)]
    batch = [Completion(asked[i // 8], i % 8, a, [0.0] * answer, "", "length", 1) for i, a in enumerate(answers)]
    experience = packed(batch)
    cuts = cut(experience, torch.arange(24), budget)
    assert torch.cat(cuts).tolist() == list(range(24))
    assert [select(experience, sequences).forest.tokens.numel() for sequences in cuts] == filled


def test_samples_that_begin_alike_share_tokens_and_keep_every_number(tiny_model: Path) -> None:
    """Seven answers of one prompt that part at different places; two are equal, one is the beginning of another."""
    policy = load_tiny(tiny_model)
    prompt = Prompt("p", [9, 8, 7, 6, 5, 4], "")
    answers = [[10, 11, 12, 13], [10, 11, 12, 14, 15], [10, 11], [20, 21], [10, 11, 12, 13], [10, 30, 31], [20, 21, 22]]
    completions = [Completion(prompt, i, a, [0.0] * len(a), "", "stop", 1) for i, a in enumerate(answers)]
    experience = packed(completions)
    assert experience.forest.tokens.numel() == 6 + len({tuple(a[: i + 1]) for a in answers for i in range(len(a))})
    assert experience.forest.tokens[experience.forest.sampled].tolist() == [t for a in answers for t in a]
    policy.select(TRAINED)
    weights = torch.randn(experience.layout.num_tokens, generator=torch.Generator().manual_seed(2))
    scores = policy.logprobs(experience.forest, adapter=TRAINED, entropy=True)
    alone = [policy.logprobs(packed([c]).forest, adapter=TRAINED, entropy=True) for c in completions]
    theirs = separate_logprobs(policy, completions, 1.0)
    assert (scores.logprobs - theirs).abs().max() < 2e-5
    assert scores.entropy is not None
    assert (scores.entropy - torch.cat([s.entropy for s in alone if s.entropy is not None])).abs().max() < 2e-5
    mine_g, theirs_g = gradients(policy, scores.logprobs @ weights), gradients(policy, theirs @ weights)
    scale = max(float(g.abs().max()) for g in theirs_g.values())
    assert max(float((mine_g[k] - theirs_g[k]).abs().max()) for k in theirs_g) < 2e-5 * scale
    for sequences in cut(experience, torch.arange(7), 12):
        part = select(experience, sequences)
        mask = torch.isin(experience.layout.sequence, sequences)
        assert (policy.logprobs(part.forest, adapter=TRAINED).logprobs - theirs[mask]).abs().max() < 2e-5


def test_deeper_segments_attend_to_their_ancestors_only(tiny_model: Path) -> None:
    """A conversation: prompt -> turn -> two replies. Each leaf equals its own path run alone."""
    from lorl.experience import Forest
    from lorl.policy.attention import ForestAttention

    policy = load_tiny(tiny_model)
    generator = torch.Generator().manual_seed(3)
    pieces = [torch.randint(2, 258, (length,), generator=generator) for length in (6, 4, 5, 3)]
    parent = [-1, 0, 1, 1]
    starts = [0, 6, 10, 10]
    positions = torch.cat([torch.arange(len(p)) + s for p, s in zip(pieces, starts, strict=True)])
    offsets = torch.tensor([0, 6, 10, 15, 18], dtype=torch.int32)
    none = torch.zeros(0, dtype=torch.int64)
    forest = Forest(torch.cat(pieces), positions, offsets, torch.tensor(parent, dtype=torch.int32), none, none)
    whole = policy.hidden(ForestAttention(forest), forest.tokens, forest.positions, adapter=TRAINED)
    policy._base.set_attn_implementation("eager")
    for leaf, span in ((2, slice(10, 15)), (3, slice(15, 18))):
        path = torch.cat([pieces[0], pieces[1], pieces[leaf]])
        alone = policy._decoder(input_ids=path[None], use_cache=False).last_hidden_state[0]
        assert (whole[span] - alone[10:]).abs().max() < 1e-4
    policy._base.set_attn_implementation("lorl")


def test_adapter_off_is_the_base(tiny_model: Path) -> None:
    policy = load_tiny(tiny_model)
    forest = packed(random_batch()).forest
    on = policy.logprobs(forest, adapter=TRAINED).logprobs
    off = policy.logprobs(forest, adapter=None).logprobs
    base = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")
    completion = random_batch()[0]
    tokens = torch.tensor(completion.prompt.tokens + completion.tokens)
    start = len(completion.prompt.tokens)
    log_p = base(input_ids=tokens[None]).logits[0, start - 1 : -1].log_softmax(-1)
    expected = log_p.gather(1, tokens[start:, None]).squeeze(1)
    assert (off[: len(expected)] - expected).abs().max() < 1e-5
    assert (on - off).abs().max() > 1e-2
    again = policy.logprobs(forest, adapter=TRAINED).logprobs
    assert torch.equal(on, again)


def test_entropy_of_a_uniform_head_is_log_vocabulary(tiny_model: Path) -> None:
    policy = load_tiny(tiny_model)
    policy._head.weight.data.zero_()
    entropy = policy.logprobs(packed(random_batch()).forest, adapter=TRAINED, entropy=True).entropy
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([math.log(258)] * len(entropy), rel=1e-5)

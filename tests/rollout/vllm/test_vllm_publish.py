"""Adapters in vLLM's slots: of every shape, several at once, exactly what the trainer holds, and nothing else."""

from collections.abc import Iterator

import pytest
import torch
from peft import LoraConfig

from lorl.errors import InfrastructureError, UserError
from lorl.experience import Completion
from lorl.policy.load import TRAINED
from lorl.rollout.vllm import slots
from vllm_engines import Opened, distance, draw, needs_vllm, opened, run, save_model

pytestmark = needs_vllm

ADAPTERS = {
    "rank 4": {"r": 4},
    "rank 24": {"r": 24},
    "rslora": {"r": 16, "use_rslora": True},
    "rank_pattern": {"r": 2, "rank_pattern": {"q_proj": 7, "down_proj": 20}, "alpha_pattern": {"q_proj": 5}},
    "queries": {"r": 8, "target_modules": ["q_proj"]},
    "values and ups": {"r": 8, "target_modules": ["v_proj", "up_proj"]},
    "downs": {"r": 8, "target_modules": ["down_proj"]},
    "one layer": {"r": 8, "target_modules": r".*layers\.1\..*_proj"},
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """Slots of rank 32, one for each adapter here."""
    folder = save_model(tmp_path_factory.mktemp("models") / "llama")
    with opened(folder, "adapter.rank=24", f"rollout.adapter_slots={len(ADAPTERS) + 1}") as found:
        for index, (name, fields) in enumerate(ADAPTERS.items()):
            lora = LoraConfig(**({"lora_alpha": 8, "target_modules": "all-linear"} | fields))
            found.policy.add_adapter(name, lora, seed=0, learns=False)
            draw(found.policy, index, name, std=0.1)
            found.publish(name, version=10 + index)
        yield found


def tokens(answers: list[Completion]) -> list[list[int]]:
    return [c.tokens for c in answers]


def test_every_live_adapter_answers_as_itself(found: Opened) -> None:
    answers = {name: run(found.engine, name) for name in ADAPTERS}
    for index, name in enumerate(ADAPTERS):
        assert {c.version for c in answers[name]} == {10 + index}
        assert distance(found.policy, answers[name], name) < 1e-4
        assert distance(found.policy, answers[name], None) > 1e-3, "an adapter that does nothing would pass as well"
    assert distance(found.policy, run(found.engine), None) < 1e-4


def test_an_adapter_that_changed_on_the_way_is_not_published(found: Opened) -> None:
    with pytest.raises(InfrastructureError, match=r"the engine was given .*, the trainer published another"):
        found.engine.publish("queries", 14, "another")
    found.publish("queries", version=14)


@pytest.mark.parametrize("name", ["rank 24", "rank_pattern", "rslora", "queries"])
def test_folded_adapters_answer_as_themselves(found: Opened, name: str) -> None:
    found.engine.folds = True
    try:
        assert distance(found.policy, run(found.engine, name), name) < 1e-4
    finally:
        found.engine.folds = False


def test_many_versions_stay_as_close_as_the_first(found: Opened) -> None:
    base = found.policy.base_checksum()
    for version in range(1, 51):
        draw(found.policy, version)
        found.publish(version=version)
    for folds in (False, True):
        found.engine.folds = folds
        answers = run(found.engine, TRAINED)
        assert {c.version for c in answers} == {50}
        assert distance(found.policy, answers, TRAINED) < 1e-4
        assert distance(found.policy, run(found.engine), None) < 1e-4
    found.engine.folds = False
    assert found.policy.base_checksum() == base
    assert len(found.engine.inside.adapters.list_adapters()) <= len(ADAPTERS) + 1


def test_publishing_does_not_change_the_masters(found: Opened) -> None:
    draw(found.policy, 1)
    before = {name: value.detach().clone() for name, value in found.policy.parameters(TRAINED).items()}
    found.publish(version=60)
    for name, value in found.policy.parameters(TRAINED).items():
        assert torch.equal(value, before[name]), name


def test_publishing_the_same_values_again_gives_the_same_samples(found: Opened) -> None:
    draw(found.policy, 1)
    found.publish(version=61)
    first = run(found.engine, TRAINED)
    found.publish(version=62)
    assert tokens(run(found.engine, TRAINED)) == tokens(first)


def test_the_first_publish_of_a_fresh_adapter_is_the_base(found: Opened) -> None:
    with torch.no_grad():
        for name, value in found.policy.parameters(TRAINED).items():
            if "lora_B" in name:
                value.zero_()
    found.publish(version=63)
    assert tokens(run(found.engine, TRAINED)) == tokens(run(found.engine))


def test_what_was_never_published_or_has_changed_since_is_refused(found: Opened) -> None:
    draw(found.policy, 2)
    with pytest.raises(InfrastructureError, match="stale; publish it first"):
        run(found.engine, TRAINED)
    found.publish(version=64)
    run(found.engine, TRAINED)
    with pytest.raises(InfrastructureError, match="'nobody' was never published"):
        run(found.engine, "nobody")


def test_parts_of_a_publish_are_timed(found: Opened) -> None:
    found.publish(version=65)
    times = found.engine.publish_times
    assert min(times.gather, times.copy, times.activate, times.slots, times.answers) > 0


def test_an_adapter_too_many_is_refused(found: Opened) -> None:
    found.publish(version=66)
    found.policy.freeze_copy(TRAINED, "one too many")
    with pytest.raises(InfrastructureError, match=r"'one too many' finds no slot.*raise rollout\.adapter_slots"):
        found.publish("one too many")


# What does not bind


def links_of(found: Opened, names: dict[str, torch.Tensor]) -> list[slots.Link]:
    inside = found.engine.inside
    scaling = {slots.module_of(name): 1.0 for name in names}
    return slots.link(names, scaling, inside.adapters.modules, inside.packed_modules(), 0)


def test_tensors_that_bind_to_nothing_are_named(found: Opened) -> None:
    name = "base_model.model.model.layers.0.mlp.side_proj.lora_A.weight"
    with pytest.raises(
        UserError, match=r"layers\.0\.mlp\.side_proj\.lora_A\.weight' binds to nothing.*exclude_modules"
    ):
        links_of(found, {name: torch.zeros(4, 64)})
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_A.weight"
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.lora_A\.weight' binds to nothing"):
        links_of(found, {name: torch.zeros(4, 64)})


def test_tensors_that_do_not_fit_are_named(found: Opened) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    with pytest.raises(UserError, match=r"up_proj\.lora_A\.weight' has shape \(33, 64\).*lower adapter\.rank"):
        links_of(found, {name: torch.zeros(33, 64)})
    with pytest.raises(UserError, match=r"up_proj\.lora_A\.weight' has shape \(4, 63\)"):
        links_of(found, {name: torch.zeros(4, 63)})


@pytest.mark.parametrize("name", ["lora_embedding_A", "lora_magnitude_vector.weight"])
def test_kinds_without_a_slot_are_named(found: Opened, name: str) -> None:
    with pytest.raises(UserError, match=rf"{name}.*no slot for"):
        links_of(found, {f"base_model.model.model.layers.0.mlp.up_proj.{name}": torch.zeros(4, 64)})


def test_a_slot_that_holds_something_else_is_found_and_named(found: Opened) -> None:
    draw(found.policy, 3)
    found.publish(version=70)
    links = found.engine._published[TRAINED].links
    assert slots.differing(links) == []
    links[5].target[0, 0] += 1e-6
    assert slots.differing(links) == [links[5].name]
    links[5].target[0, 0] = torch.nan
    with pytest.raises(InfrastructureError, match=r"version 70.*differs from the trainer in 1 of 28 tensors"):
        slots.check(links, "adapter 'policy' version 70")
    slots.write(links)
    assert slots.differing(links) == []

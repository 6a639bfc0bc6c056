"""A control of the proofs: every fault known to have let a run sample from the wrong policy, planted and caught.

Two proofs stand behind a publish. The slots are compared with the masters, and answers of both sides with each other.
Each fault is planted twice: as it is, and with the first proof switched off, so that the second has to find it. What
is caught is named: the tensor, or the layers.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from lorl.errors import DivergedError, InfrastructureError
from lorl.policy.load import TRAINED
from lorl.policy.policy import Policy
from lorl.rollout.vllm import slots
from lorl.rollout.vllm.engine import VllmEngine
from lorl.rollout.vllm.versions import Inside
from vllm_engines import Opened, distance, draw, needs_vllm, opened, run, save_model

pytestmark = needs_vllm

Plant = Callable[[pytest.MonkeyPatch, Opened], None]
WRITE = slots.write
LINK = slots.link


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    """With as many heads of keys as of queries: swapped, they fit."""
    folder = save_model(tmp_path_factory.mktemp("models") / "llama", num_key_value_heads=2)
    with opened(folder) as found:
        yield found


@pytest.fixture(params=[False, True], ids=["adapter", "fold"])
def found(shared: Opened, request: pytest.FixtureRequest) -> Iterator[Opened]:
    shared.engine.folds = request.param
    draw(shared.policy, 1)
    shared.publish()
    draw(shared.policy, 2)
    yield shared
    shared.engine.folds = False
    shared.engine._published.clear()  # what a planted fault did to the slot or its links is not taken over
    draw(shared.policy, 3)
    shared.publish(version=9)
    assert distance(shared.policy, run(shared.engine, TRAINED), TRAINED) < 1e-5


def stale_adapter(patch: pytest.MonkeyPatch, found: Opened) -> None:
    patch.setattr(slots, "write", lambda links: None)


def missing_layer(patch: pytest.MonkeyPatch, found: Opened) -> None:
    def write(links: list[slots.Link]) -> None:
        WRITE(links)
        for link in links:
            if "layers.1.self_attn.v_proj" in link.name:
                link.target.zero_()

    patch.setattr(slots, "write", write)


def one_wrong_number(patch: pytest.MonkeyPatch, found: Opened) -> None:
    def write(links: list[slots.Link]) -> None:
        WRITE(links)
        links[0].target[0, 0] += 1.0

    patch.setattr(slots, "write", write)


def wrong_scaling(patch: pytest.MonkeyPatch, found: Opened) -> None:
    right = found.policy.scaling(TRAINED)
    patch.setattr(Policy, "scaling", lambda policy, name: {module: factor / 2 for module, factor in right.items()})
    found.engine._published.clear()


def swapped_q_and_k(patch: pytest.MonkeyPatch, found: Opened) -> None:
    packed = found.engine.inside.packed_modules() | {"qkv_proj": ["k_proj", "q_proj", "v_proj"]}
    patch.setattr(Inside, "packed_modules", lambda inside: packed)
    found.engine._published.clear()


def base_instead_of_adapter(patch: pytest.MonkeyPatch, found: Opened) -> None:
    sample = VllmEngine._sample

    def without(self: VllmEngine, requests: Any, sampling: Any, version: int, options: Any, salt: Any = None) -> Any:
        return sample(self, requests, sampling, version, {}, salt)

    patch.setattr(VllmEngine, "_sample", without)


def stale_prefix_cache(patch: pytest.MonkeyPatch, found: Opened) -> None:
    """The version before had the label that this one will get."""
    found.engine._last_id -= 1


@pytest.mark.parametrize("plant", [stale_adapter, missing_layer, one_wrong_number])
def test_slots_that_differ_from_the_masters(found: Opened, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        plant(patch, found)
        with pytest.raises(
            InfrastructureError, match=r"version 2: the engine's slot differs from the trainer in \d+ of"
        ):
            found.publish(version=2)


FAULTS: dict[Plant, str] = {
    stale_adapter: r"differ in model\.layers\.0 .*, model\.layers\.1\.",
    missing_layer: r"differ in model\.layers\.1 \(self_attn\.v_proj\)\.",
    one_wrong_number: r"differ in model\.layers\.0 \(mlp\.down_proj\)\.",
    wrong_scaling: r"differ in model\.layers\.0 \(mlp\.down_proj, .*, model\.layers\.1\.",
    swapped_q_and_k: r"differ in model\.layers\.0 \(self_attn\.k_proj, self_attn\.q_proj\), model\.layers\.1\.",
    base_instead_of_adapter: "it samples from the base: the adapter is not applied",
}


@pytest.mark.parametrize("plant", FAULTS)
def test_answers_that_differ_from_the_trainers(shared: Opened, plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the slots' own mode: a folded adapter does not come by them. The layer is named."""
    found: Opened = shared
    draw(found.policy, 1)
    found.publish()
    draw(found.policy, 2)
    masters = {name: master.clone() for name, master in found.policy.parameters(TRAINED).items()}
    try:
        with monkeypatch.context() as patch:
            plant(patch, found)
            patch.setattr(slots, "check", lambda links, what: None)
            said = f"version 2: engine and trainer differ by .*{FAULTS[plant]}"
            with pytest.raises(DivergedError, match=said):
                found.publish(version=2)
        assert all(torch.equal(found.policy.parameters(TRAINED)[name], masters[name]) for name in masters)
    finally:
        found.engine._published.clear()


def test_keys_of_another_version_in_the_prefix_cache(found: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    stale_prefix_cache(monkeypatch, found)
    with pytest.raises(DivergedError, match="they agree; the prefix cache may hold keys of another version"):
        found.publish(version=1)

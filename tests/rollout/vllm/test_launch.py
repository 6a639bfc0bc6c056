"""What vLLM is started with."""

import pytest
import torch

from lorl import settings
from lorl.errors import UserError
from lorl.rollout.vllm.launch import check_mode, compilation, graph_sizes

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (6, [1, 2, 3, 4, 6]), (20, [1, 2, 3, 4, 6, 8, 12, 16, 20])])
def test_every_batch_has_a_graph_that_is_at_most_half_as_large_again(most: int, sizes: list[int]) -> None:
    assert graph_sizes(most) == sizes
    for batch in range(1, most + 1):
        assert min(size for size in sizes if size >= batch) <= 1.5 * batch


def test_by_default_only_decoding_steps_are_captured_and_nothing_is_compiled() -> None:
    plain, compiled = (
        compilation(settings.load(None, ["rollout.max_concurrent=6", f"rollout.compile={asked}"]))
        for asked in ("false", "true")
    )
    assert compiled == {"cudagraph_capture_sizes": [1, 2, 3, 4, 6]}
    assert plain == {**compiled, "mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}


def test_a_float32_base_on_a_gpu_is_folded_or_refused_in_a_sentence() -> None:
    for mode in ("auto", "fold"):
        check_mode(mode, CUDA, torch.float32)
    check_mode("adapter", CUDA, torch.bfloat16)
    check_mode("adapter", CPU, torch.float32)
    with pytest.raises(UserError, match=r"model\.dtype=float32.*rollout\.adapter_mode=fold"):
        check_mode("adapter", CUDA, torch.float32)
    with pytest.raises(UserError, match="strategy=ddp"):
        check_mode("adapter", CUDA, torch.float32, parts=True)

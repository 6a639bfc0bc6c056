"""Fewer questions to vLLM's block manager: what the host does in a decoding step is what a small model waits for.

In each step vLLM asks its block manager about every running sample: whether the next token needs a block of the KV
cache, and whether one has become full, which other requests could then begin with. The answer is no but for the first
and the last token of a block (16 on a GPU, 128 on a CPU), and finding that out for each takes a quarter of what vLLM's
scheduler does ("Where a decoding step's time goes" in docs/performance.md).
"""

from typing import Any


def skip_known_answers(blocks: Any) -> None:
    """Has vLLM's KVCacheManager `blocks` answer at once for a sample whose next token falls into a block that it has.

    Full attention alone: other kinds of layers free blocks as their samples grow.
    """
    kinds = blocks.coordinator.single_type_managers
    if [type(kind).__name__ for kind in kinds] != ["FullAttentionManager"]:
        return
    allocate, cache, size = blocks.allocate_slots, blocks.cache_blocks, kinds[0].block_size

    def inside_a_block(computed: int) -> bool:
        # The first token needs a block. With the last, or once it is known where vLLM runs a step ahead, the block is
        # full, and kept for others.
        return 0 < computed % size < size - 1

    def allocate_slots(request: Any, count: int, *rest: Any, **options: Any) -> Any:
        decodes = count == 1 and not rest and not any(options.values())  # a sample that begins comes with options
        if decodes and inside_a_block(request.num_computed_tokens):
            return blocks.empty_kv_cache_blocks
        return allocate(request, count, *rest, **options)

    def cache_blocks(request: Any, computed: int) -> None:
        if not (request.num_output_tokens > 1 and inside_a_block(computed)):  # a prompt may fill several blocks at once
            cache(request, computed)

    blocks.allocate_slots, blocks.cache_blocks = allocate_slots, cache_blocks

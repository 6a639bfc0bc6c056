"""Rates that were measured, which the plan's seconds rest on; each with its source. All on one H100 at 1.5B, rank 32.

They are shares of the data sheet's figures, so that another GPU or another width gets an estimate, and a GPU that was
measured gets back what was measured. `tests/plan` holds the plan to the sources' own numbers.
"""

TRAINING_SHARE = 0.34
"""Of the dense bfloat16 rate, forward and backward: 50,536 packed tokens a second in micro-batches of 17,408
(docs/performance.md, "The training pass on the GPU")."""

SCORING_SHARE = 0.31
"""Of the same, forward alone: 96,000 packed tokens a second (same place)."""

PASS_SECONDS_A_LAYER = 0.185 / 28
"""Of Python in a training pass, whatever its size: "a pass costs about 185 ms of Python" at 28 layers (same place). A
pass without gradient is taken for a third of it."""

DECODE_SECONDS = 7.2e-3
"""Of the host in each decoding step of an engine: what a step of 256 sequences takes (25,277 tokens a second folded,
with log-probabilities, 256 + 512 tokens: docs/performance.md, "vLLM on the trainer's weights") beyond the reading of
weights and keys at HBM_SHARE."""

HBM_SHARE = 0.7
"""Of the memory's rate when decoding reads weights and keys. Assumed; only its sum with DECODE_SECONDS was measured."""

PUBLISH_SECONDS_A_LAYER = 0.204 / 28
"""Of a publish and its proof: 1 ms to copy, 8 ms to compare slots and 195 ms to compare answers, at 28 layers (same
place)."""

LINK_SHARE = 0.8
"""Of a link's rate in large collectives. Assumed, not measured: no machine with two GPUs was at hand."""

COLLECTIVE_SECONDS = 12e-6
"""Of a small all-reduce within a node, which tensor-parallel decoding does twice a layer. Assumed, not measured."""

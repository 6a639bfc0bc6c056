"""Rates that were measured, which the plan's seconds rest on, each with its source in docs/performance.md; at rank 32.

They are shares of the data sheet's figures, so that another GPU or another width gets an estimate, and a GPU that was
measured gets back what was measured. `tests/plan` holds the plan to the sources' own numbers.
"""

TRAINING_SHARES = ((1536, 0.35), (3584, 0.47), (5120, 0.49))
"""Of the dense bfloat16 rate, forward and backward, by hidden size (between these in proportion, beyond them as the
nearest): updates of 1.5B, 7B and 32B on an H100 in 2.67 s ("A whole GRPO step on the GPU", the earlier machine), 2.17
and 14.0 s ("The plan beside what was measured"). Wider products fill the GPU better; at 32B layers were computed
again."""

SCORING_SHARE = 0.31
"""Of the same, forward alone, at 1.5B: 96,000 packed tokens a second ("The training pass on the GPU")."""

PASS_SECONDS_A_LAYER = 0.185 / 28
"""Of Python in a training pass, whatever its size: "a pass costs about 185 ms of Python" at 28 layers (same place). A
pass without gradient is taken for a third of it."""

HOST_SECONDS_A_SAMPLE = 32e-6
"""Of vLLM's own loop in each decoding step: 8.3 ms at 256 samples, which make 30,860 tokens a second ("vLLM on the
trainer's weights", the earlier machine), while the GPU needs 6.1 ("Where a decoding step's time goes"). vLLM prepares a
step while the GPU works on the last one, so that the longer of the two counts."""

HBM_SHARE = 0.7
"""Of the memory's rate when decoding reads weights and keys. Assumed; with the two below it gives the steps of 1.5B,
7B and 32B on an H100: 6.1 ms of GPU time at 256 samples, 9.1 and 36 ms at 64 (same places)."""

LAYER_SECONDS = 43e-6
"""Of the GPU in each layer of a decoding step beside that, whatever the batch: the adapter's and other small kernels.
Fitted to the same three."""

LAYER_SECONDS_A_SAMPLE = 0.27e-6
"""The same, for each sample. Fitted to the same three."""

PUBLISH_SECONDS_A_LAYER = 0.204 / 28
"""Of a publish and its proof, 0.20 s at 28 layers ("A whole GRPO step on the GPU", the earlier machine): a millisecond
to copy, 10 to compare slots, and the rest to compare answers."""

LINK_SHARE = 0.8
"""Of a link's rate in large collectives. Assumed, not measured."""

COLLECTIVE_SECONDS = 65e-6
"""Of an all-reduce within a node, which tensor-parallel decoding does twice a layer, beside what its bytes take: what
the figures above leave of 36 ms a decoding step, 32B over four H200s at 320 samples ("32B on four GPUs"). How much of
it is the all-reduce itself (NCCL's: vLLM's own is off) was not looked into."""

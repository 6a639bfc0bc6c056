"""What a run will cost in memory and time: arithmetic on the model's shape, checked against what was measured.

A run asks it as well: `memory` for the size of vLLM's KV cache and whether it rests (`lorl.rollout.vllm.opening`),
`footprint` for whether layers are recomputed (`lorl.policy.layers`).
"""

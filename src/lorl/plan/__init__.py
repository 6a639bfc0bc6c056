"""What a run will cost in memory and time: arithmetic on the model's shape, checked against what was measured.

`shape`, `lora` and `footprint` hold formulas that a run itself uses as well: for vLLM's budget
(`lorl.rollout.vllm.memory`), and for whether layers are recomputed (`lorl.policy.layers`).
"""

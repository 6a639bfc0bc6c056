"""What a run will cost in memory and time: arithmetic on the model's shape, checked against what was measured.

`shape`, `lora` and `footprint` hold formulas that a run's own budget (`lorl.rollout.vllm.memory`) uses as well.
"""

"""Advantages, policy losses, KL, rollout correction: pure functions on the tokens that the policy sampled.

Shapes: M sampled tokens, S sequences, G groups (see `lorl.experience.Sampled`). A fully masked sequence owns no token,
so no formula carries a mask; a sample that was not graded has reward NaN, takes no part in any baseline, and gets
advantage zero. Every function keeps its inputs' dtype and device.

`catalogue` finds the functions by name and imports no torch until a function is asked for.
"""

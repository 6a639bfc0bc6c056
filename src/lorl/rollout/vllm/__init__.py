"""Rollouts by vLLM in the trainer's process, on one base that both read."""

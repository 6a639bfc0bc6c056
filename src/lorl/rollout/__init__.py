"""Rollout engines: prompts in, sampled completions out."""

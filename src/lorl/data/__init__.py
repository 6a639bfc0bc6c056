"""Prompt files to Prompts, resumable loading, and the writers that make prompt files (GSM8K, reasoning-gym tasks)."""

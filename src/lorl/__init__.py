"""lorl: reinforcement learning for language models through LoRA adapters on one shared, frozen base."""

__version__ = "0.1.0"

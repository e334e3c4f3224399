"""megascratch: a Megatron-style 3D-parallel LLM training system."""

__version__ = "0.1.0"

"""DSpark speculative decoding for vLLM. Importing this package imports nothing else."""

__version__ = "0.1.0"

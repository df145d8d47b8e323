"""Rounds of verification for a set of prompts, from vLLM or from `decode.py`."""

"""The adapter to vLLM's V2 model runner, which has a DSpark of its own: it is extended.

Drafter classes, caches, CUDA graphs and verification stay vLLM's. Only `symbols` may be
imported where vLLM is not.
"""

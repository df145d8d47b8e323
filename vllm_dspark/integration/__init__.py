"""The only package of vllm-dspark that imports vllm.

``compat`` names every vLLM symbol touched here; ``patches`` holds the few functions
that replace one of vLLM's; everything else subclasses or is called by vLLM.
"""

"""vLLM engines of several arms in one process, for benchmarks that let them take turns.

What a server adds (HTTP, its own process) is left out.
"""

from __future__ import annotations

import os
from typing import Any

from _sweep_arms import Arm

# Before vLLM is imported: engines in this process, their threads bound to no core.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def set_environment() -> None:
    """What is set already stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def build(arm: Arm, target: str, kv_gib: float, **settings: Any) -> Any:
    """An arm's eager engine (vLLM's `LLMEngine`), to be stepped by hand.

    Args:
        arm: how it speculates.
        target: model folder.
        kv_gib: GiB of K/V cache.
        settings: further arguments of vLLM's `LLM`.
    """
    from vllm import LLM

    if arm.additional_config:
        settings["additional_config"] = arm.additional_config
    made = LLM(
        target,
        enforce_eager=True,
        kv_cache_memory_bytes=int(kv_gib * 2**30),
        speculative_config=arm.speculative_config,
        **settings,
    )
    return made.llm_engine


def draft_counts(engine: Any) -> tuple[int, int]:
    """Draft tokens made and verified so far; zeros without DSpark's controller."""
    core = engine.engine_core.engine_core
    controller = getattr(core.scheduler, "controller", None)
    if controller is None:
        return 0, 0
    return controller.totals.drafted, controller.totals.verified

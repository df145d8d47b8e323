"""vLLM engines of several arms in one process, for benchmarks that let them take turns.

What a server adds (HTTP, its own process) is left out.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _sweep_arms import Arm

from vllm_dspark.cli.settings import intel_openmp
from vllm_dspark.cli.signals import interrupt

# Before vLLM is imported: engines in this process, their threads bound to no core.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def add_flags(
    parser: argparse.ArgumentParser,
    arms: list[str],
    max_prompt_tokens: int,
    max_model_len: int,
    kv_gib: float,
) -> None:
    """The options of every such benchmark, with its own defaults."""
    add = parser.add_argument
    add("--target", required=True)
    add("--drafter", required=True)
    add("--prompts", required=True, type=Path)
    add("--out", required=True, type=Path)
    add("--arms", nargs="+", default=arms, help="the first one is the reference")
    add("--max-prompt-tokens", type=int, default=max_prompt_tokens)
    add("--max-model-len", type=int, default=max_model_len)
    add("--dtype", default="auto")
    add("--kv-gib", type=float, default=kv_gib)
    add("--seed", type=int, default=0)


def preload() -> None:
    """Begin this script again with Intel's OpenMP, as the servers have it, if it lacks.

    vLLM asks for it where it speculates on CPUs; it must be there before Python starts.
    """
    wanted = intel_openmp()
    loaded = os.environ.get("LD_PRELOAD", "")
    if wanted is None or wanted.name in loaded:
        return
    os.environ["LD_PRELOAD"] = ":".join(filter(None, (str(wanted), loaded)))
    os.execv(sys.executable, [sys.executable, *sys.argv])


def main(name: str, run: Callable[[], None]) -> int:
    """Run a benchmark of that name; its exit status."""
    signal.signal(signal.SIGTERM, interrupt)
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    try:
        run()
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def described(args: argparse.Namespace, arms: Sequence[Arm]) -> dict[str, Any]:
    """What a benchmark was asked for, for its results."""
    return {
        "settings": {k: str(v) for k, v in vars(args).items()},
        "arms": [arm.as_json() for arm in arms],
    }


def build(arm: Arm, args: argparse.Namespace, **settings: Any) -> Any:
    """An arm's eager engine (vLLM's `LLMEngine`), to be stepped by hand.

    Args:
        arm: how it speculates.
        args: with the options of `add_flags`.
        settings: further arguments of vLLM's `LLM`.
    """
    from vllm import LLM

    if arm.additional_config:
        settings["additional_config"] = arm.additional_config
    made = LLM(
        args.target,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
        enforce_eager=True,
        kv_cache_memory_bytes=int(args.kv_gib * 2**30),
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

"""Runs vLLM engines in this process, one after another, on tiny models.

Greedy, float32, eager: what a test compares is exact. An engine starts in about three
seconds once vLLM is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before vllm is imported: no thread binding (shared machines), no second process, and
# one thread: on tiny models the others only spin (50 times slower on a busy machine).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

KV_BYTES = 64 << 20


@dataclass(frozen=True)
class SpecStats:
    """Totals of vLLM's own counters."""

    drafts: int
    draft_tokens: int
    accepted: int
    accepted_per_position: list[int]

    @property
    def tau(self) -> float:
        """Tokens emitted per round, bonus included."""
        return 1 + self.accepted / max(self.drafts, 1)


class Engine:
    """An offline engine with token-id prompts."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm

    def generate(self, prompts: Sequence[list[int]], params: Any) -> list[Any]:
        """Outputs in the order of the prompts."""
        rows = [{"prompt_token_ids": p} for p in prompts]
        return self.llm.generate(rows, params, use_tqdm=False)

    def tokens(self, prompts: Sequence[list[int]], params: Any) -> list[list[int]]:
        """Output token ids of the first completion of each prompt."""
        outputs = self.generate(prompts, params)
        return [list(o.outputs[0].token_ids) for o in outputs]

    @property
    def worker(self) -> Any:
        """The worker, in this process."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker

    @property
    def runner(self) -> Any:
        """The model runner, in this process."""
        return self.worker.model_runner

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    def stats(self) -> SpecStats:
        values: dict[str, Any] = {}
        for metric in self.llm.get_metrics():
            if metric.name.startswith("vllm:spec_decode_num_"):
                found = getattr(metric, "values", None)
                values[metric.name] = metric.value if found is None else list(found)
        prefix = "vllm:spec_decode_num_"
        return SpecStats(
            drafts=values[prefix + "drafts"],
            draft_tokens=values[prefix + "draft_tokens"],
            accepted=values[prefix + "accepted_tokens"],
            accepted_per_position=values[prefix + "accepted_tokens_per_pos"],
        )


@contextmanager
def engine(
    target: Path,
    drafter: Path | None = None,
    *,
    spec: dict | None = None,
    **kwargs: Any,
) -> Iterator[Engine]:
    """An engine on ``target``; with DSpark when a drafter is given.

    Args:
        spec: further keys of speculative_config.
        kwargs: engine arguments.
    """
    import torch
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    # vLLM pins this function once an engine runs; by then it is set.
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    settings: dict[str, Any] = {
        "model": str(target),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": KV_BYTES,
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    settings.update(kwargs)
    if drafter is not None:
        config = {"method": "dspark", "model": str(drafter), **(spec or {})}
        settings["speculative_config"] = config
        # Every draft verified, and no profiling at start, unless a test is about that.
        ours = {
            "policy": "fixed",
            **(kwargs.get("additional_config") or {}).get("dspark", {}),
        }
        settings["additional_config"] = {"dspark": ours}
    llm = LLM(**settings)
    try:
        yield Engine(llm)
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        # Also ends the process groups of other engines in this process.
        cleanup_dist_env_and_memory()

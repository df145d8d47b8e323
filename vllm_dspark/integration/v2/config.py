"""Puts our workers into a configuration with DSpark on the V2 runner.

Runs inside ``VllmConfig.__post_init__`` (see `patches`). Whatever does not fit leaves
vLLM's own DSpark as it is, with a line in the log that says why; only what the user
asked of us and cannot have is an error.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from vllm_dspark.integration import compat
from vllm_dspark.integration.config import check_files, options
from vllm_dspark.ops.rejection import METHODS

logger = logging.getLogger("vllm_dspark")

_WORKER = "vllm_dspark.integration.v2.worker."
# What vLLM's platforms put there when the user named no worker class.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": _WORKER + "DSparkV2CPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": _WORKER + "DSparkV2GPUWorker",
}

# Of our options; the others are for the V1 runner so far.
_SERVED = ("calibration", "rejection_kernel")


def activate(vllm_config: Any) -> None:
    """Extend vLLM's DSpark, if this vLLM is one that the adapter fits. Idempotent.

    Raises:
        ValueError: an unknown or bad option, a file of the user's that is not there, or
            our rejection kernel where it cannot run.
    """
    chosen = options(vllm_config)
    check_files({"calibration": chosen.calibration, "cost_table": chosen.cost_table})
    parallel = vllm_config.parallel_config
    reason = compat.v2_trouble()
    if not reason and parallel.worker_cls not in (*WORKERS, *WORKERS.values()):
        reason = (
            f"its V2 adapter does not know the worker class {parallel.worker_cls!r}"
        )
    if chosen.rejection_kernel == "dspark":
        _check_kernel(vllm_config, reason)
    if reason:
        _say_once(f"vLLM's own DSpark serves, without vllm-dspark: {reason}")
        return
    if parallel.worker_cls in WORKERS.values():
        return
    parallel.worker_cls = WORKERS[parallel.worker_cls]
    given = sorted(set((vllm_config.additional_config or {}).get("dspark") or ()))
    if without := [key for key in given if key not in _SERVED]:
        _say_once(
            f"dspark options without effect on the V2 runner so far: "
            f"{', '.join(without)}; vLLM's own settings rule there"
        )


def _check_kernel(vllm_config: Any, reason: str | None) -> None:
    """ValueError unless our rejection kernel can verify what this asks for."""
    method = vllm_config.speculative_config.rejection_sample_method
    if not reason and method not in METHODS:
        reason = f"it has no rejection_sample_method {method!r}, only {METHODS}"
    if not reason and getattr(vllm_config, "watermark_config", None) is not None:
        reason = "it draws no watermarked tokens"
    if reason:
        raise ValueError(
            f"dspark option 'rejection_kernel' is 'dspark', but {reason}: leave the "
            "option out, then vLLM's kernels verify"
        )


@lru_cache(maxsize=8)
def _say_once(line: str) -> None:
    """vLLM validates copies of its configuration, too."""
    logger.warning(line)

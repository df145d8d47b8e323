"""Puts our workers and schedulers into a configuration with DSpark on the V2 runner.

Runs inside ``VllmConfig.__post_init__`` (see `patches`). Whatever does not fit leaves
vLLM's own DSpark as it is, with a line in the log that says why; only what the user
asked of us and cannot have is an error.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from vllm_dspark.integration import compat, patches
from vllm_dspark.integration.config import (
    check_files,
    check_folders,
    check_policy,
    options,
)
from vllm_dspark.integration.v2.trims import SCHEDULERS, Trims
from vllm_dspark.ops.rejection import METHODS

logger = logging.getLogger("vllm_dspark")

_V2 = "vllm_dspark.integration.v2."
# What vLLM's platforms put there when the user named no worker class.
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": _V2 + "cpu_worker.DSparkV2CPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": _V2 + "worker.DSparkV2GPUWorker",
}
# Of our options, those of the V1 runner only.
_NOT_SERVED = ("backend", "trace")
# Those that need no controller.
_WITHOUT_CONTROLLER = ("calibration", "rejection_kernel")


def activate(vllm_config: Any) -> None:
    """Extend vLLM's DSpark, if this vLLM is one that the adapter fits. Idempotent.

    Raises:
        ValueError: an unknown or bad option, a file of the user's that is not there,
            our rejection kernel where it cannot run, or a policy that cannot be had.
    """
    chosen = options(vllm_config)
    check_folders({"step_log": chosen.step_log})
    check_files({"calibration": chosen.calibration, "cost_table": chosen.cost_table})
    check_policy(vllm_config.speculative_config, chosen.policy)
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
    without = list(_NOT_SERVED)
    if why := _no_controller(vllm_config):
        without = [o for o in chosen.__slots__ if o not in _WITHOUT_CONTROLLER]
        _say_once(f"vLLM's own settings choose lengths: {why}")
    else:
        _set_scheduler(vllm_config, chosen.policy)
        patches.activate()
    given = sorted(set((vllm_config.additional_config or {}).get("dspark") or ()))
    if vain := [key for key in given if key in without]:
        _say_once(f"dspark options without effect on this V2 runner: {', '.join(vain)}")


def _no_controller(vllm_config: Any) -> str | None:
    """Why lengths cannot be chosen by us, if so."""
    parallel, spec = vllm_config.parallel_config, vllm_config.speculative_config
    scheduler = vllm_config.scheduler_config.scheduler_cls
    if scheduler is not None:
        return f"--scheduler-cls {scheduler!r} is the user's"
    if parallel.pipeline_parallel_size > 1:
        return f"pipeline_parallel_size is {parallel.pipeline_parallel_size}"
    if parallel.data_parallel_size > 1:
        # Its ranks draft in step, each with a scheduler of its own.
        return f"data_parallel_size is {parallel.data_parallel_size}"
    if spec.num_speculative_tokens_per_batch_size is not None:
        return "num_speculative_tokens_per_batch_size is given"
    return None


def _set_scheduler(vllm_config: Any, policy: str) -> None:
    """The scheduler class for who trims, and for whether steps overlap.

    Raises:
        ValueError: drafts shall be trimmed where nobody can.
    """
    scheduler, spec = vllm_config.scheduler_config, vllm_config.speculative_config
    overlap = bool(scheduler.async_scheduling)
    asked, why = spec.enable_adaptive_verification, _no_device(vllm_config)
    if policy == "fixed":
        trims = Trims.NOBODY
    elif asked and not why:
        trims = Trims.DEVICE
    elif not overlap and (why or policy == "threshold"):
        trims = Trims.HOST
    else:
        trims = Trims.NOBODY
    if trims is Trims.NOBODY and (asked or policy == "threshold"):
        cure = f"{why}; " if why else "set enable_adaptive_verification, or "
        raise ValueError(
            f"dspark option 'policy' is {policy!r} and enable_adaptive_verification is "
            f"{str(asked).lower()}, but nothing can trim drafts: {cure}with "
            "--no-async-scheduling the scheduler does"
        )
    if trims is Trims.NOBODY and policy == "adaptive":
        _say_once(
            "draft lengths are chosen, but all drafts are verified: they are trimmed "
            "with "
            + ("--no-async-scheduling" if why else "enable_adaptive_verification")
        )
    # Only the device's trimming is vLLM's business.
    spec.enable_adaptive_verification = trims is Trims.DEVICE
    scheduler.scheduler_cls = SCHEDULERS[trims, overlap]


def _no_device(vllm_config: Any) -> str | None:
    """Why vLLM would refuse to trim on the device, if so (as its own check does)."""
    if vllm_config.lora_config is not None:
        return "vLLM's device trims without LoRA only"
    if not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs():
        return "vLLM's device trims with full CUDA graphs only"
    return None


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

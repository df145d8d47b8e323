"""Decides whether a vLLM configuration is ours, validates it, and sets our classes.

Runs inside ``VllmConfig.__post_init__`` (see ``patches``), so every user error
below is raised before the engine starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from vllm_dspark.config import (
    DrafterConfig,
    DSparkOptions,
    resolve_num_speculative_tokens,
)
from vllm_dspark.integration import compat, patches
from vllm_dspark.model import checkpoint
from vllm_dspark.model.fit import TargetFacts, check_fit
from vllm_dspark.ops.rejection import METHODS

WORKER_CLS = "vllm_dspark.integration.cpu_worker.DSparkCPUWorker"
WORKER_CLS_GPU = "vllm_dspark.integration.worker.DSparkGPUWorker"
SCHEDULER_CLS = "vllm_dspark.integration.scheduler.DSparkScheduler"
EXECUTOR_CLS = "vllm_dspark.integration.executor.DSparkMultiprocExecutor"
# What vLLM's platforms put there when the user named no worker class.
_STOCK_WORKERS = {
    "auto": None,
    "vllm.v1.worker.cpu_worker.CPUWorker": WORKER_CLS,
    "vllm.v1.worker.gpu_worker.Worker": WORKER_CLS_GPU,
}


def is_ours(speculative_config: Any) -> bool:
    """Whether this speculative config runs on our worker (not on vLLM's V2 DSpark)."""
    if speculative_config is None or speculative_config.method != "dspark":
        return False
    parallel = getattr(speculative_config, "target_parallel_config", None)
    return getattr(parallel, "worker_cls", None) in (WORKER_CLS, WORKER_CLS_GPU)


def has_controller(vllm_config: Any) -> bool:
    """Whether the scheduler is one of ours, on either runner."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    return isinstance(scheduler, str) and scheduler.startswith("vllm_dspark.")


def options(vllm_config: Any) -> DSparkOptions:
    """``additional_config["dspark"]`` as validated options.

    Raises:
        ValueError: an unknown key or a bad value.
    """
    extra = vllm_config.additional_config
    raw = extra.get("dspark") if isinstance(extra, dict) else None
    return DSparkOptions.from_dict(raw or {})


def check_request(extra_args: Mapping[str, Any] | None) -> None:
    """Refuse a request (``vllm_xargs``) whose goal is none; other keys are not ours.

    Raises:
        VLLMValidationError: what vLLM raises for such requests (servers answer 400);
            says what the goal should be.
    """
    if not extra_args or "slo_tps" not in extra_args:
        return
    goal = extra_args["slo_tps"]
    try:
        DSparkOptions(slo_tps=goal)
    except ValueError as error:
        from vllm.exceptions import VLLMValidationError

        raise VLLMValidationError(str(error), parameter="vllm_xargs") from error


def activate(vllm_config: Any) -> None:
    """Make a V1 configuration with method ``dspark`` run on our worker.

    Idempotent: vLLM re-validates copies of its configuration.

    Raises:
        ValueError: this vLLM lacks a symbol we need; a bad option or checkpoint; a
            drafter that does not fit the target; a feature we cannot serve; a
            worker or scheduler class of the user's that is not ours.
    """
    compat.require()
    chosen = options(vllm_config)
    check_folders({"trace": chosen.trace, "step_log": chosen.step_log})
    check_files({"calibration": chosen.calibration, "cost_table": chosen.cost_table})
    check_policy(vllm_config.speculative_config, chosen.policy)
    if chosen.rejection_kernel == "vllm":
        raise ValueError(
            "dspark option 'rejection_kernel' is 'vllm', which only the V2 runner has: "
            "the V1 runner verifies with the plugin's; leave the option out"
        )
    # Ours needs neither CUDA graphs nor the rest of what vLLM asks for its own.
    vllm_config.speculative_config.enable_adaptive_verification = False
    _refuse_unsupported(vllm_config)
    _validate_drafter(vllm_config)
    _set_worker(vllm_config.parallel_config)
    _set_executor(vllm_config)
    _set_scheduler(vllm_config.scheduler_config)
    patches.activate()


def check_folders(named: dict[str, str | None]) -> None:
    """Files that are written: their folders must be there."""
    for name, path in named.items():
        if path is not None and not os.path.isdir(os.path.dirname(path) or "."):
            raise ValueError(
                f"dspark option {name!r} is {path!r}, but there is no folder "
                f"{os.path.dirname(path)}; make it first"
            )


def check_files(named: dict[str, str | None]) -> None:
    """Files that are read: they must be there."""
    for name, path in named.items():
        if path is not None and not os.path.isfile(path):
            raise ValueError(
                f"dspark option {name!r} is {path!r}, but there is no such file"
            )


def check_policy(speculative_config: Any, policy: str) -> None:
    """ValueError where vLLM's switch asks for another policy than ours."""
    if speculative_config.enable_adaptive_verification and policy != "adaptive":
        raise ValueError(
            f"enable_adaptive_verification is true, but dspark option 'policy' is "
            f"{policy!r}: leave one of them out"
        )


def _refuse_unsupported(vllm_config: Any) -> None:
    spec = vllm_config.speculative_config
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ValueError(
            "method 'dspark' on vLLM's V1 runner does not support pipeline "
            f"parallelism (pipeline_parallel_size="
            f"{vllm_config.parallel_config.pipeline_parallel_size}); use tensor "
            "parallelism instead"
        )
    if spec.rejection_sample_method not in METHODS:
        raise ValueError(
            f"rejection_sample_method={spec.rejection_sample_method!r} is not served "
            f"by vllm-dspark on the V1 runner; use one of {METHODS}"
        )
    if spec.disable_padded_drafter_batch:
        raise ValueError(
            "disable_padded_drafter_batch=True has no meaning for method 'dspark'; "
            "remove it"
        )
    if vllm_config.model_config.is_multimodal_model:
        raise ValueError(
            "vllm-dspark on the V1 runner drafts for text-only targets; "
            f"{vllm_config.model_config.model} is multimodal"
        )
    _refuse_target_without_features(spec.target_model_config)


def _refuse_target_without_features(target: Any) -> None:
    """Refuse a model class that cannot hand out hidden states of its layers.

    vLLM says so only once the weights are loaded.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3

    model_class, architecture = target.registry.resolve_model_cls(
        target.architectures, target
    )
    if not supports_eagle3(model_class):
        raise ValueError(
            f"the target {target.model} ({architecture}) cannot be drafted for: "
            f"vLLM's {model_class.__name__} has no auxiliary hidden states "
            "(SupportsEagle3); Llama and Qwen3 models have them"
        )


def check_drafter_config(path: str | None) -> None:
    """Read a drafter's config.json before vLLM does, on a platform with the V1 runner.

    Raises:
        ValueError: it is not one we can run.
    """
    from vllm import envs
    from vllm.triton_utils import HAS_TRITON

    forced = envs.VLLM_USE_V2_MODEL_RUNNER
    if HAS_TRITON if forced is None else forced:
        return
    if path is not None and os.path.isfile(os.path.join(path, "config.json")):
        checkpoint.load_config(path)


def drafter_folder(speculative_config: Any) -> str:
    """The drafter's local folder; a repository name is fetched into the hub's cache.

    Only JSON and safetensors files are fetched.

    Raises:
        ValueError: neither a folder nor a repository that can be had.
    """
    name, revision = speculative_config.model, speculative_config.revision
    if name is not None and os.path.isdir(name):
        return str(name)
    return _fetched(name, revision)


@lru_cache(maxsize=8)
def _fetched(name: str | None, revision: str | None) -> str:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    try:
        if name is None:
            raise ValueError("no name given")
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    # The hub's client raises errors of its own, of httpx and of the file system.
    except Exception as error:
        raise ValueError(
            f"speculative_config.model={name!r} is neither a folder nor a repository "
            f"that could be fetched ({error}); give the path of a DSpark drafter "
            "(config.json + model.safetensors)"
        ) from error


def _validate_drafter(vllm_config: Any) -> None:
    spec = vllm_config.speculative_config
    path = drafter_folder(spec)
    config = _checked_config(path, _fingerprint(path))
    target = TargetFacts.from_hf_config(
        vllm_config.model_config.hf_text_config.to_dict()
    )
    check_fit(config, target)
    resolve_num_speculative_tokens(spec.num_speculative_tokens, config.block_size)


def _fingerprint(path: str) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the folder's files: a cheap cache key."""
    with os.scandir(path) as entries:
        rows = [(e.name, e.stat()) for e in entries if e.is_file()]
    return tuple(sorted((name, st.st_size, st.st_mtime_ns) for name, st in rows))


@lru_cache(maxsize=8)
def _checked_config(path: str, fingerprint: object) -> DrafterConfig:
    """Configuration of a checkpoint whose headers are sound (once per state)."""
    del fingerprint
    checkpoint.check_checkpoint(path)
    return checkpoint.load_config(path)


def _set_worker(parallel: Any) -> None:
    if parallel.worker_cls in (WORKER_CLS, WORKER_CLS_GPU):
        return
    if parallel.worker_cls not in _STOCK_WORKERS:
        raise ValueError(
            f"--worker-cls {parallel.worker_cls!r} does not go with method 'dspark': "
            f"leave it out, or subclass {WORKER_CLS!r} and name the subclass "
            "in a fork of this plugin"
        )
    ours = _STOCK_WORKERS[parallel.worker_cls]
    if ours is not None:
        parallel.worker_cls = ours


def _set_executor(vllm_config: Any) -> None:
    """Fewer messages between the processes of a CPU server.

    Left alone with K/V connectors, which look for vLLM's own executor by its name.
    """
    parallel = vllm_config.parallel_config
    if (
        parallel.worker_cls == WORKER_CLS
        and parallel.distributed_executor_backend == "mp"
        and vllm_config.kv_transfer_config is None
    ):
        parallel.distributed_executor_backend = EXECUTOR_CLS


def _set_scheduler(scheduler: Any) -> None:
    if scheduler.scheduler_cls == SCHEDULER_CLS:
        return
    if scheduler.scheduler_cls is not None:
        raise ValueError(
            f"--scheduler-cls {scheduler.scheduler_cls!r} does not go with method "
            f"'dspark', which needs {SCHEDULER_CLS!r}: leave it out"
        )
    scheduler.scheduler_cls = SCHEDULER_CLS
    # Drafts reach the scheduler after each step; CPU has async scheduling off anyway.
    scheduler.async_scheduling = False

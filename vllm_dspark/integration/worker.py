"""Workers that build our model runner; otherwise vLLM's own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import vllm.v1.worker.cpu_worker as cpu_worker
import vllm.v1.worker.gpu_model_runner as gpu_model_runner
import vllm.v1.worker.gpu_worker as gpu_worker

from vllm_dspark.integration.config import options
from vllm_dspark.integration.runner import DSparkCPUModelRunner, DSparkGPUModelRunner
from vllm_dspark.ops import extension_native


@contextmanager
def _swapped(module: ModuleType, name: str, value: Any) -> Iterator[None]:
    """``module.name`` is ``value`` inside the block.

    vLLM's workers name their runner class in the body of ``init_device``, which has
    no parameter for it. Remove when: the runner class becomes configurable.
    """
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _log_like_vllm() -> None:
    """Our log lines go where vLLM's go; otherwise those of level INFO go nowhere."""
    ours, theirs = logging.getLogger("vllm_dspark"), logging.getLogger("vllm")
    if not ours.handlers:
        ours.handlers = list(theirs.handlers)
        ours.setLevel(theirs.level)


def _require_kernels(backend: str) -> None:
    """RuntimeError now for a stale or missing build, not with the first request."""
    if backend == "native":
        extension_native.require()
    elif backend == "auto":
        extension_native.load()


class DSparkCPUWorker(cpu_worker.CPUWorker):
    """CPU worker with DSpark on the V1 runner."""

    def init_device(self) -> None:
        _log_like_vllm()
        _require_kernels(options(self.vllm_config).backend)
        with _swapped(cpu_worker, "CPUModelRunner", DSparkCPUModelRunner):
            super().init_device()


class DSparkGPUWorker(gpu_worker.Worker):
    """GPU worker with DSpark on the V1 runner (VLLM_USE_V2_MODEL_RUNNER=0)."""

    def init_device(self) -> None:
        _log_like_vllm()
        with _swapped(gpu_model_runner, "GPUModelRunner", DSparkGPUModelRunner):
            super().init_device()

"""The worker and runner of the CPU wheels, on vLLM's V1 runner.

Apart from the GPU's: importing vLLM's CPU worker changes buffers and Triton for CPUs in
the whole process (`vllm.v1.worker.cpu.shm`), and no kernel on a GPU works after that.
"""

from __future__ import annotations

import vllm.v1.worker.cpu_worker as cpu_worker
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_dspark.integration.config import EXECUTOR_CLS, options
from vllm_dspark.integration.runner import DSparkRunnerMixin
from vllm_dspark.integration.say import log_like_vllm
from vllm_dspark.integration.worker import ReportingWorker, swapped
from vllm_dspark.ops import extension_native


class DSparkCPUModelRunner(DSparkRunnerMixin, CPUModelRunner):
    """The V1 runner of the CPU wheels with DSpark."""


def _require_kernels(backend: str) -> None:
    """RuntimeError now for a stale or missing build, not with the first request."""
    if backend == "native":
        extension_native.require()
    elif backend == "auto":
        extension_native.load()


class DSparkCPUWorker(ReportingWorker, cpu_worker.CPUWorker):
    """CPU worker with DSpark on the V1 runner."""

    def init_device(self) -> None:
        log_like_vllm()
        _require_kernels(options(self.vllm_config).backend)
        with swapped(cpu_worker, "CPUModelRunner", DSparkCPUModelRunner):
            super().init_device()
        backend = self.parallel_config.distributed_executor_backend
        # Otherwise the executor asks for the drafts, and for each part of a step.
        self._one_message = backend == EXECUTOR_CLS

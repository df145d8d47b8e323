"""vLLM's workers with our parts in their V2 runner."""

from __future__ import annotations

from typing import Any

import vllm.v1.worker.cpu_worker as cpu_worker
import vllm.v1.worker.gpu_worker as gpu_worker

from vllm_dspark.integration.config import options
from vllm_dspark.integration.say import log_like_vllm
from vllm_dspark.integration.v2 import hooks


class _ExtendingWorker:
    """What both add: our speculator, in place before the runner is built, and our
    rejection kernel, once it has its sampler.
    """

    def init_device(self) -> None:
        log_like_vllm()
        hooks.install()
        super().init_device()  # type: ignore[misc]

    def load_model(self, **keys: Any) -> None:
        super().load_model(**keys)  # type: ignore[misc]
        config = self.vllm_config  # type: ignore[attr-defined]
        if options(config).rejection_kernel == "dspark":
            from vllm_dspark.integration.v2.sampler import put_in_place

            put_in_place(self.model_runner, config)  # type: ignore[attr-defined]


class DSparkV2CPUWorker(_ExtendingWorker, cpu_worker.CPUWorker):
    """CPU worker on the V2 runner: for Triton's interpreter, that is for tests."""


class DSparkV2GPUWorker(_ExtendingWorker, gpu_worker.Worker):
    """GPU worker on the V2 runner."""

"""vLLM's CPU worker with our parts in its V2 runner.

Apart from the GPU's, as `vllm_dspark.integration.cpu_worker` is.
"""

from __future__ import annotations

import vllm.v1.worker.cpu_worker as cpu_worker

from vllm_dspark.integration.v2.worker import ExtendingWorker


class DSparkV2CPUWorker(ExtendingWorker, cpu_worker.CPUWorker):
    """CPU worker with the V2 runner extended."""

"""Workers that build our model runner; otherwise vLLM's own (CPU: `cpu_worker`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import vllm.v1.worker.gpu_model_runner as gpu_model_runner
import vllm.v1.worker.gpu_worker as gpu_worker
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import ModelRunnerOutput

from vllm_dspark.integration.profiling import StepTimer
from vllm_dspark.integration.report import StepReport, give_report
from vllm_dspark.integration.reporting import CostReporting
from vllm_dspark.integration.runner import DSparkGPUModelRunner
from vllm_dspark.integration.say import log_like_vllm


@contextmanager
def swapped(module: ModuleType, name: str, value: Any) -> Iterator[None]:
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


class ReportingWorker(CostReporting):
    """What both workers add: a report with every output, the costs with the first."""

    _one_message = False
    _seconds = 0.0  # of the step under way

    def _timer(self) -> StepTimer:
        return StepTimer(self.model_runner)  # type: ignore[attr-defined]

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run the model; sample and draft at once unless a grammar comes first."""
        start = time.perf_counter()
        output = super().execute_model(scheduler_output)  # type: ignore[misc]
        self._seconds = time.perf_counter() - start
        grammar = scheduler_output.has_structured_output_requests
        if output is None and self._one_message and not grammar:
            return self.sample_tokens(None)
        return output

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample and draft; a report leaves with the output."""
        runner = self.model_runner  # type: ignore[attr-defined]
        start = time.perf_counter()
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        self._seconds += time.perf_counter() - start
        if isinstance(output, ModelRunnerOutput):
            seconds, *drafted = runner.take_draft_times()
            drafts = runner.take_draft_token_ids() if self._one_message else None
            target = self._seconds - seconds
            owed = runner.drafter.context.take_owed()
            cost = self.take_cost()
            give_report(
                output, StepReport(drafts, target, seconds, *drafted, cost, owed)
            )
        return output


class DSparkGPUWorker(ReportingWorker, gpu_worker.Worker):
    """GPU worker with DSpark on the V1 runner (VLLM_USE_V2_MODEL_RUNNER=0)."""

    def init_device(self) -> None:
        log_like_vllm()
        with swapped(gpu_model_runner, "GPUModelRunner", DSparkGPUModelRunner):
            super().init_device()

"""vLLM's workers with our parts in their V2 runner."""

from __future__ import annotations

from typing import Any

import vllm.v1.worker.gpu_worker as gpu_worker
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds

from vllm_dspark.integration.config import options
from vllm_dspark.integration.report import DSparkDraftTokenIds, take_plan
from vllm_dspark.integration.reporting import CostReporting
from vllm_dspark.integration.say import log_like_vllm
from vllm_dspark.integration.v2 import hooks
from vllm_dspark.integration.v2.lora import LoraRows
from vllm_dspark.integration.v2.profiling import V2StepTimer
from vllm_dspark.integration.v2.trims import Trims, trims_of


class ExtendingWorker(CostReporting):
    """What both add: our speculator and verification, in place before the runner is
    built, our rejection kernel once it has its sampler, and a report with every output.
    """

    def init_device(self) -> None:
        log_like_vllm()
        hooks.install()
        super().init_device()  # type: ignore[misc]
        config = self.vllm_config  # type: ignore[attr-defined]
        self._trims = trims_of(config)
        self._lora: LoraRows | None = None

    def load_model(self, **keys: Any) -> None:
        super().load_model(**keys)  # type: ignore[misc]
        config = self.vllm_config  # type: ignore[attr-defined]
        if config.lora_config is not None:
            self._lora = LoraRows(self.model_runner.lora_state)  # type: ignore[attr-defined]
        if options(config).rejection_kernel == "dspark":
            from vllm_dspark.integration.v2 import sampler

            sampler.put_in_place(self.model_runner, config)  # type: ignore[attr-defined]

    def _timer(self) -> V2StepTimer:
        return V2StepTimer(self.model_runner)  # type: ignore[attr-defined]

    def _wants_costs(self) -> bool:
        return self._trims is not Trims.NOT_OURS and super()._wants_costs()

    @property
    def _follows(self) -> bool:
        """Whether our parts follow a step.

        Not those of vLLM's warm-up, which takes the verification on the device away.
        """
        if self._trims is Trims.DEVICE:
            return self.model_runner.adaptive_verification is not None  # type: ignore[attr-defined]
        return self._trims is not Trims.NOT_OURS

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        """Run the model, within the step's budget."""
        if self._lora is not None:
            self._lora.step(scheduler_output)
        if self._follows:
            runner, plan = self.model_runner, take_plan(scheduler_output)
            runner.speculator.meter.step(plan.number)
            if self._trims is Trims.DEVICE:
                runner.adaptive_verification.expect(plan.budget)
        return super().execute_model(scheduler_output)  # type: ignore[misc]

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample and draft; a report leaves with the output."""
        runner = self.model_runner  # type: ignore[attr-defined]
        if not self._follows:
            return super().sample_tokens(grammar_output)  # type: ignore[misc]
        meter = runner.speculator.meter
        before, lens = meter.drafted, None
        output = super().sample_tokens(grammar_output)  # type: ignore[misc]
        if output is None:
            return None
        on_device = self._trims is Trims.DEVICE
        if on_device:
            lens = runner.adaptive_verification.take_lens()
        return meter.reporting(output, before, lens, on_device, self.take_cost())

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """vLLM's; with their confidences, where the scheduler trims by them."""
        drafts = super().take_draft_token_ids()  # type: ignore[misc]
        if drafts is None or self._trims is not Trims.HOST:
            return drafts
        drafted = self.model_runner.speculator.meter.drafted  # type: ignore[attr-defined]
        known = None if drafted is None else drafted.confidences()
        return DSparkDraftTokenIds(
            drafts.req_ids,
            drafts.draft_token_ids,
            None if known is None else known.values,
        )


class DSparkV2GPUWorker(ExtendingWorker, gpu_worker.Worker):
    """GPU worker with the V2 runner extended."""

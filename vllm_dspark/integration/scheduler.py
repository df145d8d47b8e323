"""The scheduler's side: trims drafts when a step is built, and says how many to draft.

Confidences arrive with the drafts, times with the outputs (`report`). Everything is
decided by `schedule.controller`; here it is told what vLLM is about to do, and vLLM is
told what it decided, before blocks and budgets are given out: what trimming frees is
there for others in the same step.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_dspark.integration import stats
from vllm_dspark.integration.build import build_controller
from vllm_dspark.integration.config import options
from vllm_dspark.integration.grammar import PADDING, keep_forbidden, without_forbidden
from vllm_dspark.integration.planned import Planned
from vllm_dspark.integration.report import (
    CostReport,
    StepReport,
    give_skip,
    take_report,
)
from vllm_dspark.integration.say import Sayer
from vllm_dspark.integration.step_log import StepLog
from vllm_dspark.metrics import Reporter
from vllm_dspark.schedule.cost_keeper import CostKeeper
from vllm_dspark.schedule.facts import Batch


class DSparkScheduler(Scheduler):
    """vLLM's synchronous scheduler with the controller in front."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dynamic_sd_lookup is None:
            # Otherwise vLLM gives a request with one token left to compute (a short
            # prompt, or all but one found in the prefix cache) K drafts of -1, for the
            # sake of CUDA graphs: rows that nobody drafted and nobody can verify.
            # The table is "dynamic K by batch size", which `schedule` decides below.
            most = self.scheduler_config.max_num_seqs
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (most + 1)
        # c_1..c_K of the drafts a request will verify next, by request id.
        self.draft_confidences: dict[str, np.ndarray] = {}
        self.controller = build_controller(self.vllm_config, self.num_spec_tokens)
        self._sayer = Sayer(self.controller)
        spec = self.vllm_config.speculative_config
        self._samples_drafts = spec.draft_sample_method == "probabilistic"
        self._reporter = Reporter(self.controller)
        stats.add_fields()
        self._keeper: CostKeeper | None = None
        named = options(self.vllm_config).step_log
        self._step_log = None if named is None else StepLog(named)
        self._planned: Planned | None = None
        self._started: float | None = None  # of the step before, if it was busy since
        self._worked = 0.0  # seconds of the worker in it

    # ---- before a step ----

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        now, built = time.perf_counter(), time.monotonic()
        overhead = None if self._started is None else now - self._started - self._worked
        self._started = now
        requests = [r for r in self.running if _decodes(r)]
        batch = self._batch(requests)
        start = time.perf_counter()
        choice = self.controller.draft(batch)
        plan, made = self.controller.verify(batch, choice.positions)
        self._reporter.planned(time.perf_counter() - start)
        for request, length in zip(requests, plan.verify_lens.tolist(), strict=True):
            if length < len(request.spec_token_ids):
                request.spec_token_ids = request.spec_token_ids[:length]
        output = super().schedule(*args, **kwargs)
        output.num_spec_tokens_to_schedule = choice.positions
        give_skip(output, choice.skip)
        self._planned = Planned(
            batch.ids,
            batch.num_drafts,
            made,
            batch.context_tokens,
            choice.positions,
            choice.reason,
            overhead,
            built,
        )
        return output

    def _batch(self, requests: list[Request]) -> Batch:
        num_drafts = np.array([len(r.spec_token_ids) for r in requests], dtype=np.int64)
        width = int(num_drafts.max(initial=0))
        rows = [self.draft_confidences.get(r.request_id) for r in requests]
        confidence = None
        if width and any(row is not None for row in rows):
            confidence = np.full((len(requests), width), np.nan)
            for i, row in enumerate(rows):
                if row is not None:
                    confidence[i, : len(row[:width])] = row[:width]
        return Batch(
            tuple(r.request_id for r in requests),
            tuple(_temperature(r) for r in requests),
            num_drafts,
            confidence,
            self._prefill_tokens(len(requests)),
            sum(r.num_computed_tokens for r in requests),
            np.array([self._goal(r) for r in requests], dtype=np.float64),
        )

    def _prefill_tokens(self, decoding: int) -> int:
        """Prompt tokens that the step will hold, as far as its budget goes."""
        wanted = sum(
            r.num_tokens - r.num_computed_tokens
            for r in self.running
            if not _decodes(r)
        )
        places = self.max_num_running_reqs - len(self.running)
        for request in self.waiting:
            if places <= 0:
                break
            wanted += request.num_tokens - request.num_computed_tokens
            places -= 1
        return max(0, min(wanted, self.max_num_scheduled_tokens - decoding))

    def _goal(self, request: Request) -> float:
        params = request.sampling_params
        extra = params.extra_args if params is not None else None
        # Checked when the request came (`config.check_request`).
        return float((extra or {}).get("slo_tps", self.controller.policy.slo_tps))

    # ---- after a step ----

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        report = take_report(model_runner_output)
        self._observe(scheduler_output, model_runner_output)
        if report is not None:
            self.controller.drafted(report.draft_tokens)
            self._log(scheduler_output, model_runner_output, report)
            self._learn_times(scheduler_output, report)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if report is not None and report.drafts is not None:
            self.update_draft_token_ids(report.drafts)
        if not self.has_unfinished_requests():
            self._started = None  # what follows is waiting, not work
            if self._keeper is not None:
                self._keeper.idle()
            if self._step_log is not None:
                self._step_log.flush()
        self._sayer.say()
        return outputs

    def _observe(self, step: SchedulerOutput, output: ModelRunnerOutput) -> None:
        planned = self._planned
        if planned is None or planned.made is None:
            return
        verified = np.zeros(len(planned.ids), dtype=np.int64)
        accepted, emitting = np.zeros_like(verified), np.zeros_like(verified)
        for i, req_id in enumerate(planned.ids):
            row = output.req_id_to_index.get(req_id)
            drafts = step.scheduled_spec_decode_tokens.get(req_id, ())
            if row is None or not output.sampled_token_ids:
                continue
            emitted = len(output.sampled_token_ids[row])
            verified[i] = sum(token != PADDING for token in drafts) if emitted else 0
            accepted[i] = min(max(emitted - 1, 0), verified[i])
            emitting[i] = emitted > 0
        verified = np.minimum(verified, planned.made.survival.shape[1])
        accepted = np.minimum(accepted, verified)
        self.controller.observe(planned.made, verified, accepted, emitting)
        for i in np.flatnonzero(emitting):
            request = self.requests.get(planned.ids[i])
            if request is not None and request.spec_decode_metrics is not None:
                counts = (planned.num_drafts[i], verified[i], accepted[i])
                stats.count_round(request, *map(int, counts))

    def _log(
        self, step: SchedulerOutput, output: ModelRunnerOutput, report: StepReport
    ) -> None:
        planned = self._planned
        if self._step_log is not None and planned and step.total_num_scheduled_tokens:
            self._step_log.step(self.controller, planned, step, output, report)

    def _learn_times(self, step: SchedulerOutput, report: StepReport) -> None:
        if report.cost is not None:
            self._price(report.cost)
        planned, tokens = self._planned, step.total_num_scheduled_tokens
        self._worked = report.target_seconds + report.draft_seconds
        if planned is None or not tokens:
            return
        drafted = None
        prompts = tokens - len(planned.ids) - _num_drafts(step)
        # With long prompts their context K/V is most of what drafting takes.
        if report.draft_requests and prompts <= len(planned.ids):
            seconds = report.draft_seconds + report.owed_seconds
            drafted = (report.draft_requests, planned.positions, seconds)
        self.controller.timed(
            tokens,
            planned.context_tokens,
            report.target_seconds,
            drafted,
            planned.overhead,
        )

    def _price(self, cost: CostReport) -> None:
        live = self.controller.price(cost.content.table)
        if cost.cache is not None:
            self._keeper = CostKeeper(cost.cache, cost.content, live)

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        if self._samples_drafts:
            ids, blocks = draft_token_ids.req_ids, draft_token_ids.draft_token_ids
            for req_id, drafts in zip(ids, blocks, strict=True):
                request = self.requests.get(req_id)
                if request is not None and not request.is_finished():
                    keep_forbidden(request, drafts)
        confidences = getattr(draft_token_ids, "confidences", None)
        self.draft_confidences = {}
        if confidences is None:
            return
        for req_id, row in zip(draft_token_ids.req_ids, confidences, strict=True):
            request = self.requests.get(req_id)
            if request is not None and request.spec_token_ids:
                # Structured output may have cut the drafts; the prefix stays valid.
                self.draft_confidences[req_id] = row[: len(request.spec_token_ids)]

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        if self._samples_drafts and scheduler_output.has_structured_output_requests:
            scheduler_output = without_forbidden(
                scheduler_output, self.requests, self.structured_output_manager
            )
        return super().get_grammar_bitmask(scheduler_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's, with news of the controller now and then."""
        made = super().make_stats(*args, **kwargs)
        if made is not None:
            made.dspark = self._reporter.take(not self.has_unfinished_requests())
        return made

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        stats.count_if_asked(request, self.num_spec_tokens)

    def shutdown(self) -> None:
        if self._keeper is not None:
            self._keeper.keep()
        if self._step_log is not None:
            self._step_log.flush()
        super().shutdown()

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.controller.forget([request.request_id])
        return super()._free_request(request, *args, **kwargs)


def _decodes(request: Request) -> bool:
    """Whether all that is known of it but the last token is in the K/V cache."""
    return int(request.num_tokens - request.num_computed_tokens) == 1


def _num_drafts(step: SchedulerOutput) -> int:
    return sum(map(len, step.scheduled_spec_decode_tokens.values()))


def _temperature(request: Request) -> float:
    params = request.sampling_params
    return 0.0 if params is None else float(params.temperature)

"""Schedulers that do not see the drafts they schedule.

With a device that trims they give budgets, found from confidences of earlier rounds;
without one they choose how much is drafted, and all of it is verified. A step's report
says of drafting what the step before took, so steps are finished one later.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.integration.batch import filled
from vllm_dspark.integration.build import build_controller
from vllm_dspark.integration.grammar import verify_first_forbidden
from vllm_dspark.integration.planned import Done, Outcome, Planned
from vllm_dspark.integration.report import DeviceBudget, StepReport
from vllm_dspark.integration.steering import Steering
from vllm_dspark.schedule.budgeting import BudgetController
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.draft_length import Lengths
from vllm_dspark.schedule.facts import Batch, DraftPlan


class LateReports(Steering):
    """Steps are finished when the next one's report says what their drafting took."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._waiting: Done | None = None

    def _finish(self, step: Done) -> None:
        before, self._waiting = self._waiting, step
        if step.report.cost is not None:
            self._price(step.report.cost)
        if before is not None:
            super()._finish(_completed(before, step.report))

    def _idle(self) -> None:
        if self._waiting is not None and self._step_log is not None:
            # Nobody will say what its drafting took.
            report = replace(self._waiting.report, draft_seconds=None, cost=None)
            self._step_log.step(self.controller, replace(self._waiting, report=report))
        self._waiting = None
        super()._idle()

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        # Asynchronous schedulers give out placeholders of drafts here.
        self._without_skipped(scheduler_output.num_scheduled_tokens)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        made = super().get_grammar_bitmask(scheduler_output)
        if made is not None and self._samples_drafts:
            verify_first_forbidden(made, scheduler_output, self.requests)
        return made


def _completed(step: Done, later: StepReport) -> Done:
    report = replace(
        step.report,
        cost=None,
        draft_seconds=later.draft_seconds,
        draft_requests=later.draft_requests,
        draft_tokens=later.draft_tokens,
    )
    return replace(step, report=report)


def _only(planned: Planned, rows: list[int]) -> Planned:
    """A step as far as some of its requests are concerned; nothing was predicted."""
    assert planned.made is None
    return replace(
        planned,
        ids=tuple(planned.ids[i] for i in rows),
        temperatures=tuple(planned.temperatures[i] for i in rows),
        num_drafts=planned.num_drafts[rows],
        drafted_in=planned.drafted_in[rows],
    )


class Untrimmed(LateReports):
    """Chooses how many positions are drafted; all drafts are verified."""

    def _build(self) -> Controller:
        return build_controller(
            self.vllm_config, self.num_spec_tokens, lengths=Lengths.ALL
        )

    def _decide(
        self, requests: list[Request], batch: Batch, choice: DraftPlan
    ) -> tuple[Prediction | None, DeviceBudget | None]:
        _, made = self.controller.verify(batch, choice.positions)
        return made, None

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        self._keep_forbidden(draft_token_ids)
        self._without_skipped(draft_token_ids.req_ids)


class Budgeting(Untrimmed):
    """Gives the device budgets. ``draft_confidences`` are the last known of a request:
    those of drafts that the step ``_made_in`` made.
    """

    controller: BudgetController

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._made_in: dict[str, int] = {}
        self._verified: dict[str, int] = {}  # of the step whose output is read

    def _build(self) -> Controller:
        return build_controller(
            self.vllm_config, self.num_spec_tokens, lengths=Lengths.BUDGETED
        )

    def _known(self, requests: list[Request]) -> dict[str, np.ndarray]:
        """Of earlier drafts only: a budget may know nothing of those it is for."""
        known = self.draft_confidences
        return {
            r.request_id: known[r.request_id]
            for r in requests
            if self._made_in.get(r.request_id, -1)
            < self._drafted_in.get(r.request_id, -1)
            and r.request_id in known
        }

    def _decide(
        self, requests: list[Request], batch: Batch, choice: DraftPlan
    ) -> tuple[Prediction | None, DeviceBudget | None]:
        found = self.controller.budget(batch, choice.positions)
        maps = None
        if batch.num_drafts.any():
            maps = self.controller.survival.maps(batch.ids, batch.temperatures)
        return None, DeviceBudget(batch.ids, found.reserved, found.drafts, maps)

    def _hear(self, report: StepReport | None) -> None:
        self._verified = {}
        if report is None:
            return
        self._verified = report.verify_lens or {}
        if report.confidences is None:
            return
        rows = zip(report.confidences.ids, report.confidences.values, strict=True)
        for req_id, row in rows:
            if req_id in self.requests:
                self.draft_confidences[req_id] = row
                self._made_in[req_id] = report.confidences.number

    def _prediction(self, planned: Planned, found: Outcome) -> Prediction | None:
        if not planned.num_drafts.any():
            return None
        rows = [
            self.draft_confidences.get(i) if self._made_in.get(i, -1) == at else None
            for i, at in zip(planned.ids, planned.drafted_in.tolist(), strict=True)
        ]
        confidence = filled(rows, int(planned.num_drafts.max()))
        return self.controller.outcome(
            planned.ids,
            planned.temperatures,
            confidence,
            planned.num_drafts,
            found.verified,
        )

    def _observe(
        self,
        planned: Planned,
        step: SchedulerOutput,
        output: ModelRunnerOutput,
        report: StepReport | None,
    ) -> None:
        # A request may have ended while its next step was under way.
        alive = [i for i, req_id in enumerate(planned.ids) if req_id in self.requests]
        super()._observe(_only(planned, alive), step, output, report)

    def make_spec_decoding_stats(
        self,
        spec_decoding_stats: Any,
        num_draft_tokens: int,
        num_accepted_tokens: int,
        num_invalid_spec_tokens: dict[str, int] | None,
        request_id: str,
    ) -> Any:
        """vLLM's, of the drafts that were verified: it counts those scheduled."""
        if (verified := self._verified.get(request_id)) is not None:
            invalid = (num_invalid_spec_tokens or {}).get(request_id, 0)
            verified = min(verified, num_draft_tokens - invalid)
            if not verified:
                return spec_decoding_stats
            num_draft_tokens, num_invalid_spec_tokens = verified, None
        return super().make_spec_decoding_stats(
            spec_decoding_stats,
            num_draft_tokens,
            num_accepted_tokens,
            num_invalid_spec_tokens,
            request_id,
        )

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.draft_confidences.pop(request.request_id, None)
        self._made_in.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

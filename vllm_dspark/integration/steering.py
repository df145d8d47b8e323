"""The scheduler's side of the controller, for every scheduler of vLLM's.

Confidences and times arrive from the worker (`report`). Everything is decided by
`schedule.controller`; here it is told what vLLM is about to do, and vLLM is told what
it decided. How drafts are trimmed differs: `trimming` leaves them out here, before
blocks and budgets are given out; on the V2 runner the device can (`v2.budgeting`).

Nothing is learned between two steps that can wait: what a step taught is taken in while
the next one is computed, when the scheduler has nothing to do.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.integration import grammar, stats
from vllm_dspark.integration.batch import batch_of, decodes
from vllm_dspark.integration.build import build_controller
from vllm_dspark.integration.config import options
from vllm_dspark.integration.planned import Done, Outcome, Planned, done, outcome
from vllm_dspark.integration.report import (
    CostReport,
    DeviceBudget,
    StepPlan,
    StepReport,
    give_plan,
    take_plan,
    take_report,
)
from vllm_dspark.integration.say import Sayer
from vllm_dspark.integration.step_log import StepLog
from vllm_dspark.metrics import Reporter
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.cost_keeper import CostKeeper
from vllm_dspark.schedule.facts import Batch, DraftPlan, StepTimes


class Steering:
    """To be put before a scheduler class of vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Raw c_1..c_K of drafts by request: which ones, the subclass knows.
        self.draft_confidences: dict[str, np.ndarray] = {}
        self.draft_certainties: dict[str, np.ndarray] = {}  # z_1..z_K likewise
        self.controller = self._build()
        spec = self.vllm_config.speculative_config
        self._samples_drafts = spec.draft_sample_method == "probabilistic"
        self._sayer = Sayer(self.controller)
        self._reporter = Reporter(self.controller)
        stats.add_fields()
        self._keeper: CostKeeper | None = None
        named = options(self.vllm_config).step_log
        self._step_log = None if named is None else StepLog(named)
        self._numbers = itertools.count()
        self._planned: dict[int, Planned] = {}  # steps under way
        self._drafted_in: dict[str, int] = {}  # where a request's drafts come from
        self._batch: Batch | None = None  # of the step being built, or the last
        self._choice: DraftPlan | None = None  # likewise
        self._lessons: list[Callable[[], None]] = []  # of steps that are done
        self._started: float | None = None  # of the step before, if it was busy since
        self._worked = 0.0  # seconds of the worker in a step
        self._drafts_before = False  # made or at hand in the step before

    def _build(self) -> Controller:
        return build_controller(self.vllm_config, self.num_spec_tokens)

    # ---- before a step ----

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        now, built = time.perf_counter(), time.monotonic()
        overhead = None if self._started is None else now - self._started - self._worked
        self._started = now
        requests = [r for r in self.running if decodes(r)]
        self._batch = batch = batch_of(
            self,
            requests,
            self._known(requests),
            self.draft_certainties,
            self.controller.policy.slo_tps,
        )
        start = time.perf_counter()
        self._choice = choice = self.controller.draft(batch)
        made, budget = self._decide(requests, batch, choice)
        self._reporter.planned(time.perf_counter() - start)
        drafted_in = [self._drafted_in.get(i, -1) for i in batch.ids]
        output = super().schedule(*args, **kwargs)
        number = next(self._numbers)
        give_plan(output, StepPlan(number, choice.skip, budget))
        self._drafted_in.update(dict.fromkeys(output.num_scheduled_tokens, number))
        self._planned[number] = Planned(
            batch.ids,
            batch.temperatures,
            batch.num_drafts,
            np.array(drafted_in, dtype=np.int64),
            made,
            batch.context_tokens,
            choice.positions,
            choice.reason,
            overhead,
            self._drafts_before,
            built,
        )
        self._drafts_before = choice.positions > 0 or bool(batch.num_drafts.any())
        return output

    def _known(self, requests: list[Request]) -> dict[str, np.ndarray]:
        """Confidences that verification may be decided by."""
        return self.draft_confidences

    def _decide(
        self, requests: list[Request], batch: Batch, choice: DraftPlan
    ) -> tuple[Prediction | None, DeviceBudget | None]:
        """Choose what is verified; trim the requests, or say what the device may do."""
        raise NotImplementedError

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        assert self._choice is not None
        scheduler_output.num_spec_tokens_to_schedule = self._choice.positions
        super()._update_after_schedule(scheduler_output)

    def _without_skipped(self, req_ids: Iterable[str]) -> None:
        """Requests that get no drafts have none, whatever was drafted."""
        assert self._choice is not None
        for req_id in self._choice.skip.intersection(req_ids):
            if (request := self.requests.get(req_id)) is not None:
                request.spec_token_ids = []

    def _keep_forbidden(self, draft_token_ids: DraftTokenIds) -> None:
        """Give back the drafts that vLLM has cut and may not (see `grammar`)."""
        if not self._samples_drafts:
            return
        ids, blocks = draft_token_ids.req_ids, draft_token_ids.draft_token_ids
        for req_id, drafts in zip(ids, blocks, strict=True):
            request = self.requests.get(req_id)
            if request is not None and not request.is_finished():
                grammar.keep_forbidden(request, drafts)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> Any:
        # vLLM calls this when it has sent the step to its workers.
        self._learn()
        if self._batch is not None:
            self.controller.foresee(self._batch)
        # Where steps overlap vLLM has put in the placeholders.
        as_built = scheduler_output.num_invalid_spec_tokens is None
        structured = scheduler_output.has_structured_output_requests
        if structured and as_built and self._samples_drafts:
            scheduler_output = grammar.without_forbidden(
                scheduler_output, self.requests, self.structured_output_manager
            )
        return super().get_grammar_bitmask(scheduler_output)

    # ---- after a step ----

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        planned = self._planned.pop(take_plan(scheduler_output).number, None)
        report = take_report(model_runner_output)
        if planned is not None:
            self._hear(report)
            self._observe(planned, scheduler_output, model_runner_output, report)
            if report is not None:
                self.controller.drafted(report.draft_tokens)
                self._worked = report.target_seconds + report.draft_seconds
                step = done(planned, scheduler_output, model_runner_output, report)
                self._lessons.append(partial(self._finish, step))
            if self.controller.waits:
                self._learn()
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if report is not None and report.drafts is not None:
            self.update_draft_token_ids(report.drafts)
        if not self.has_unfinished_requests():
            self._learn()
            self._idle()
        self._sayer.say()
        return outputs

    def _learn(self) -> None:
        """Take in what steps that are done have taught."""
        lessons, self._lessons = self._lessons, []
        for lesson in lessons:
            lesson()

    def _hear(self, report: StepReport | None) -> None:
        """Take in confidences that came with a step, where they do."""

    def _observe(
        self,
        planned: Planned,
        step: SchedulerOutput,
        output: ModelRunnerOutput,
        report: StepReport | None,
    ) -> None:
        lens = None if report is None else report.verify_lens
        gone = {i for i in planned.ids if self._has_ended(i)}
        found = outcome(planned, step, output, lens, gone)
        made = self._prediction(planned, found)
        if made is None:
            return
        width = made.survival.shape[1]
        verified = np.minimum(found.verified, width)
        accepted = np.minimum(found.accepted, verified)
        self._lessons.append(
            partial(self.controller.observe, made, verified, accepted, found.emitting)
        )
        for i in np.flatnonzero(found.emitting):
            request = self.requests.get(planned.ids[i])
            if request is not None and request.spec_decode_metrics is not None:
                counts = (planned.num_drafts[i], verified[i], accepted[i])
                stats.count_round(request, *map(int, counts))

    def _has_ended(self, req_id: str) -> bool:
        request = self.requests.get(req_id)
        return request is None or request.is_finished()

    def _prediction(self, planned: Planned, found: Outcome) -> Prediction | None:
        """What the verified drafts were expected to do."""
        return planned.made

    def _finish(self, step: Done) -> None:
        """A step has been computed, and all of its times are known."""
        if self._step_log is not None and step.tokens:
            self._step_log.step(self.controller, step)
        self._learn_times(step)

    def _learn_times(self, step: Done) -> None:
        report, planned = step.report, step.planned
        if report.cost is not None:
            self._price(report.cost)
        if not step.tokens:
            return
        drafted = None
        # With long prompts their context K/V is most of what drafting takes.
        if report.draft_requests and step.prompt_tokens <= len(planned.ids):
            seconds = report.draft_seconds + report.owed_seconds
            drafted = (report.draft_requests, planned.positions, seconds)
        self.controller.timed(
            StepTimes(
                step.tokens,
                planned.context_tokens,
                report.target_seconds,
                drafted,
                step.prompt_tokens,
                planned.overhead,
                planned.after_drafts,
                step.verified,
            )
        )

    def _price(self, cost: CostReport) -> None:
        live = self.controller.price(cost.content.table)
        if cost.cache is not None:
            self._keeper = CostKeeper(cost.cache, cost.content, live)

    def _idle(self) -> None:
        self._started = None  # what follows is waiting, not work
        if self._keeper is not None:
            self._keeper.idle()
        if self._step_log is not None:
            self._step_log.flush()

    # ---- requests, statistics, the end ----

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """vLLM's, with news of the controller now and then."""
        made = super().make_stats(*args, **kwargs)
        if made is not None:
            last = not self.has_unfinished_requests()
            if last:
                self._learn()  # counts must be whole
            made.dspark = self._reporter.take(last)
        return made

    def add_request(self, request: Request) -> None:
        super().add_request(request)
        stats.count_if_asked(request, self.num_spec_tokens)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self._batch = None  # not to be foreseen any more, or it would be taken up again
        self.controller.forget([request.request_id])
        self._drafted_in.pop(request.request_id, None)
        return super()._free_request(request, *args, **kwargs)

    def shutdown(self) -> None:
        self._learn()
        if self._keeper is not None:
            self._keeper.keep()
        if self._step_log is not None:
            self._step_log.flush()
        super().shutdown()

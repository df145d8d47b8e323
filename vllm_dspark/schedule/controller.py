"""What each step verifies and drafts: the one part of scheduling that has a state.

Per step: `draft` chooses how many positions will be drafted at its end, from history
alone; `verify` trims the drafts that are there, by calibrated survival and what the
step costs; `observe` learns from the outcome. The parts decide (`planner`, `drafting`),
estimate (`calibration.online`) and measure (`correction`); here they are put together.

Lossless: see `planner`. Nothing learned from a round's drafts enters a decision about
that same round, except their own confidences through `planner.plan`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import numpy as np

from vllm_dspark.calibration.file import Calibration
from vllm_dspark.calibration.online import OnlineSurvival, Prediction
from vllm_dspark.config import DSparkOptions
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.correction import LiveCost
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.draft_length import Lengths
from vllm_dspark.schedule.drafting import Drafting, DraftingChoice, Reason, StepFacts
from vllm_dspark.schedule.drafting_options import DraftingOptions
from vllm_dspark.schedule.exploring import Exploring
from vllm_dspark.schedule.facts import Batch, DraftPlan, StepTimes, Totals
from vllm_dspark.schedule.forecast import Forecaster
from vllm_dspark.schedule.hope import Hope
from vllm_dspark.schedule.pricing import Pricing
from vllm_dspark.schedule.request_gate import RequestGate
from vllm_dspark.schedule.step import (
    Floats,
    Ints,
    Mask,
    StepCost,
    Stop,
    VerifyPlan,
    VerifyStep,
    numbers,
)

# While a step drafts for these reasons its outcomes are waited for.
_WAITING = (Reason.PROBE, Reason.NO_HISTORY)


class Controller:
    """One per engine, in the process of its scheduler.

    Args:
        width: γ, the most positions that are drafted.
        policy: how to choose, as the user has it.
        calibration: where confidences start from; None: raw.
        drafting: settings of the draft length.
        lengths: how verify lengths will come about; None: as the class has it.

    Until `price` is called there is no idea of costs, and everything is verified.
    """

    _lengths: ClassVar[Lengths] = Lengths.PLANNED

    def __init__(
        self,
        width: int,
        policy: DSparkOptions | None = None,
        calibration: Calibration | None = None,
        drafting: DraftingOptions | None = None,
        lengths: Lengths | None = None,
    ) -> None:
        self.width = width
        self.lengths = lengths or self._lengths
        self.policy = policy or DSparkOptions()
        self.survival = OnlineSurvival(width, calibration)
        options = drafting or DraftingOptions(bypass=self.policy.bypass)
        self.drafting = Drafting(width, options)
        self._hope = Hope(width, options.hopeful_rate)
        self._forecaster = Forecaster(self.survival, self.lengths)
        self._exploring = Exploring()
        self.gate = RequestGate(options)
        self.totals = Totals()
        self.prices: Pricing | None = None
        self._rounds_seen = 0
        self._choice = DraftingChoice(width, Reason.NO_HISTORY)

    def price(self, table: CostTable) -> LiveCost:
        """Take a cost table, and follow it live from now on."""
        self.prices = Pricing(table)
        return self.prices.live

    @property
    def live(self) -> LiveCost | None:
        """The costs that are followed, once there are any."""
        return None if self.prices is None else self.prices.live

    @property
    def overhead(self) -> float:
        """Seconds of a step outside the worker."""
        return 0.0 if self.prices is None else self.prices.overhead

    @property
    def adapts(self) -> bool:
        """Whether lengths are being chosen by cost."""
        return self.policy.policy == "adaptive" and self.prices is not None

    @property
    def waits(self) -> bool:
        """Whether the next choice wants the outcomes of all steps that are done."""
        return self.adapts and self._choice.reason in _WAITING

    # ---- before a step ----

    def foresee(self, batch: Batch) -> None:
        """Work out ahead what `draft` will want to know, if the next step is like this.

        For the time in which a step is computed; changes no choice but by what it
        knows a step earlier.
        """
        if self.adapts and batch.ids:
            assert self.prices is not None
            live, costs = self.prices.live, self.prices.costs
            live.error()  # kept for a few steps, like the forecast
            news = self._rounds_seen > 0
            self._forecaster.ahead(batch, news, live.snapshot(), costs)

    def draft(self, batch: Batch) -> DraftPlan:
        """What to draft at the end of the step; uses no draft of it."""
        if not self.adapts or not batch.ids:
            return DraftPlan(self.width, Reason.PAYS)
        assert self.prices is not None
        live, costs = self.prices.live, self.prices.costs
        news = self._rounds_seen > 0
        made = self._forecaster.of(batch, news, self.waits, live.snapshot(), costs)
        hopeful = None  # a goal comes before throughput
        if self.drafting.starting and made.reaches is None:
            limits = self._hope.survival()
            hopeful = self._forecaster.hopeful(batch, limits, costs)
        self._choice = self.drafting.choose(
            StepFacts(
                made.throughput,
                len(batch.ids),
                self._rounds_seen,
                made.acceptance,
                made.reaches,
                self.prices.doubt(),
                hopeful,
            )
        )
        self._rounds_seen = 0
        positions, skip = self._choice.positions, frozenset[str]()
        if positions:
            admitted = _thinned(self.gate.admit(batch.ids), self._choice.most_requests)
            if not admitted.all():
                rows = np.flatnonzero(~admitted)
                skip = frozenset(batch.ids[r] for r in rows)
        return DraftPlan(positions, self._choice.reason, skip)

    def verify(
        self, batch: Batch, positions: int
    ) -> tuple[VerifyPlan, Prediction | None]:
        """Verify lengths ``[R]`` of the step, and what they were chosen by.

        Args:
            batch: the step.
            positions: drafted at its end, which its round pays for as well.
        """
        num_reqs = len(batch.ids)
        if self._nothing_at_hand(batch):
            made, plan = None, planner.unpriced(num_reqs)
            if num_reqs:
                self.survival.rest()
        else:
            step, made = self._verify_step(batch, positions)
            plan = self._plan(step)
        self._count_step(plan.reason, num_reqs, positions)
        num_drafts = np.minimum(batch.num_drafts, self.width)
        self._count_lengths(num_drafts, plan.verify_lens)
        return plan, made

    def _nothing_at_hand(self, batch: Batch) -> bool:
        """Whether there is nothing to choose, as in most steps of a bypass."""
        plans = self.adapts and self.lengths is not Lengths.ALL
        return plans and not (batch.num_drafts.any() or batch.slo_tps.any())

    def _verify_step(
        self, batch: Batch, positions: int
    ) -> tuple[VerifyStep, Prediction | None]:
        """A step by the confidences that a batch has, and its survivals."""
        extra = 0.0
        cost: StepCost = _free
        if self.prices is not None:
            cost, draft_cost = self.prices.costs(batch)
            # The step's own fixed part is in `cost`; drafting is decided already.
            extra = float(draft_cost(len(batch.ids), np.array([positions]))[0])
        made, survival = None, np.zeros((len(batch.ids), 0))
        if batch.num_drafts.any():
            made = self.survival.apply(
                batch.ids, batch.temperatures, batch.confidence, batch.certainty
            )
            survival = made.survival
        elif batch.ids:
            self.survival.rest()
        step = VerifyStep(
            survival,
            batch.base_tokens,
            cost,
            extra,
            np.minimum(batch.num_drafts, survival.shape[1]),
            batch.slo_tps if batch.slo_tps.any() else 0.0,
        )
        return step, made

    def _plan(self, step: VerifyStep) -> VerifyPlan:
        if self.lengths is Lengths.ALL:
            return planner.fixed(step)
        if self.policy.policy == "threshold":
            return planner.threshold(step, self.policy.threshold)
        if not self.adapts:
            return planner.fixed(step)
        if not step.survival.size:
            return planner.nothing(step)
        if (more := self._exploring.budget(step)) is not None:
            return planner.plan_within(step, more)
        plan = planner.plan(step)
        self._exploring.saw(step, int(plan.verify_lens.sum()))
        blind = self._choice.reason is Reason.PROBE and not plan.verify_lens.any()
        # Without confidences only outcomes teach: a probe verifies one of each.
        return planner.fixed(step, 1) if blind else plan

    def _count_step(self, stop: Stop, num_reqs: int, positions: int) -> None:
        totals = self.totals
        totals.steps += 1
        totals.bypassed_steps += positions == 0 and num_reqs > 0
        totals.stops[stop.value] += 1
        totals.draft_lens[positions] += 1

    def _count_lengths(self, num_drafts: Ints, verify_lens: Ints) -> None:
        self.totals.trimmed += int((num_drafts - verify_lens).sum())
        self.totals.verify_lens.update(verify_lens.tolist())

    # ---- after a step ----

    def observe(
        self, made: Prediction, verified: Ints, accepted: Ints, emitting: Ints
    ) -> None:
        """Learn from a step's outcomes.

        Args:
            made: what `verify` gave for the step.
            verified: ``[R]`` drafts that were verified in the end.
            accepted: ``[R]`` of them accepted.
            emitting: ``[R]`` 1 for a request that emitted tokens.
        """
        self.survival.update(made, verified, accepted)
        self.gate.observe(made.ids, verified, accepted)
        if self.drafting.starting:  # nobody asks afterwards
            self._hope.observe(made, verified, accepted)
        rounds = int(emitting.sum())
        self._rounds_seen += rounds
        self.totals.verified += int(verified.sum())
        self.totals.accepted += int(accepted.sum())
        self.totals.rounds += rounds
        of_verified = numbers(0, made.survival.shape[1]) < verified[:, None]
        self.totals.expected += float(made.survival[of_verified].sum())

    def drafted(self, tokens: int) -> None:
        """Count what the worker drafted."""
        self.totals.drafted += tokens

    def timed(self, times: StepTimes) -> None:
        """Learn from what a step took."""
        if self.prices is not None:
            self.prices.learn(times)

    def forget(self, ids: Iterable[str]) -> None:
        """Drop requests that have ended."""
        ids = list(ids)
        self.survival.forget(ids)
        self.gate.forget(ids)


def _thinned(admitted: Mask, most: int | None) -> Mask:
    """At most so many of the requests that are admitted, from old to new."""
    rows = np.flatnonzero(admitted)
    if most is None or len(rows) <= most:
        return admitted
    chosen = np.zeros_like(admitted)
    apart = (len(rows) - 1) / max(most - 1, 1)
    chosen[rows[(numbers(0, most) * apart).round().astype(np.int64)]] = True
    return chosen


def _free(tokens: Ints) -> Floats:
    """Seconds of a step while nothing is known of them."""
    return np.ones(len(tokens))

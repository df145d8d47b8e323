"""What each draft length promises, worked out anew only where there is news.

Planning takes time from the step, most of all from a short one. From step to step the
contexts grow, and outcomes move histories a little: a forecast is kept for a few steps,
unless its outcomes are being waited for (a probe's).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.online import OnlineSurvival
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.draft_length import DraftCost, Lengths, best_draft_length
from vllm_dspark.schedule.facts import Batch
from vllm_dspark.schedule.step import Floats, StepCost, VerifyStep

# Steps that a forecast is kept for at most, and where outcomes came in since.
_KEPT, _KEPT_WITH_NEWS = 8, 4
# Requests from which one more or less, up to an eighth of them, changes little.
_MANY = 16


@dataclass(frozen=True)
class Forecast:
    """Promises for one batch.

    Args:
        throughput: ``[γ + 1]`` Θ by draft length, drafting paid for, in tokens/s.
        acceptance: mean share of first drafts accepted.
        reaches: ``[γ + 1]`` which draft lengths bring the requests with a goal to it,
            all of them or on average; None if there are no goals.
    """

    throughput: Floats
    acceptance: float
    reaches: NDArray[np.bool_] | None = None


class Forecaster:
    """Forecasts from the histories of requests.

    Args:
        survival: what keeps them.
        lengths: how verify lengths will come about.
    """

    def __init__(
        self, survival: OnlineSurvival, lengths: Lengths = Lengths.PLANNED
    ) -> None:
        self._survival, self._lengths = survival, lengths
        self._made: Forecast | None = None
        self._of: tuple[Batch, CostTable] | None = None
        self._age, self._news = 0, False

    def of(
        self,
        batch: Batch,
        news: bool,
        urgent: bool,
        table: CostTable,
        costs: Callable[[Batch], tuple[StepCost, DraftCost]],
    ) -> Forecast:
        """The forecast for a batch, perhaps that of a step before.

        Args:
            batch: with at least one request.
            news: outcomes came in since the last step.
            urgent: they are waited for.
            table: the costs are by it; another one is news.
            costs: of steps and of drafting, for a batch.
        """
        self._age += 1
        return self._kept(batch, news, urgent, table, costs, self._age)

    def ahead(
        self,
        batch: Batch,
        news: bool,
        table: CostTable,
        costs: Callable[[Batch], tuple[StepCost, DraftCost]],
    ) -> None:
        """Make now what `of` would have to in the next step, if that is of this batch.

        Arguments as of `of`.
        """
        self._kept(batch, news, False, table, costs, self._age + 1)

    def _kept(
        self,
        batch: Batch,
        news: bool,
        urgent: bool,
        table: CostTable,
        costs: Callable[[Batch], tuple[StepCost, DraftCost]],
        age: int,
    ) -> Forecast:
        self._news |= news
        kept = self._made
        due = age >= (_KEPT_WITH_NEWS if self._news else _KEPT)
        due |= urgent and self._news
        if kept is None or due or self._differs(batch, table):
            kept = self._made = self._make(batch, *costs(batch))
            self._of, self._age, self._news = (batch, table), 0, False
        return kept

    def hopeful(
        self,
        batch: Batch,
        survival: Floats,
        costs: Callable[[Batch], tuple[StepCost, DraftCost]],
    ) -> Floats:
        """``[γ + 1]`` Θ by draft length if ``[γ]`` survivals were those of all."""
        best = best_draft_length(
            survival, len(batch.ids), batch.base_tokens, *costs(batch), self._lengths
        )
        return best.throughput

    def _differs(self, batch: Batch, table: CostTable) -> bool:
        assert self._of is not None
        before, priced = self._of
        same = table is priced and batch.prefill_tokens == before.prefill_tokens
        if batch.ids == before.ids:
            return not same
        # In a large batch there is a new request in nearly every step.
        n, was = len(batch.ids), len(before.ids)
        alike = was >= _MANY and 8 * abs(n - was) <= was
        return not (same and alike) or bool(batch.slo_tps.any() or before.slo_tps.any())

    def _make(self, batch: Batch, cost: StepCost, draft_cost: DraftCost) -> Forecast:
        history = self._survival.history(batch.ids, batch.temperatures)
        best = best_draft_length(
            history,
            len(batch.ids),
            batch.base_tokens,
            cost,
            draft_cost,
            self._lengths,
        )
        reaches = None
        if batch.slo_tps.any():
            of_all = best.throughput / len(batch.ids) >= batch.slo_tps.max()
            reaches = of_all | _reaching(history, batch, cost, draft_cost)
        return Forecast(best.throughput, float(history[:, 0].mean()), reaches)


def _reaching(
    history: Floats, batch: Batch, cost: StepCost, draft_cost: DraftCost
) -> NDArray[np.bool_]:
    """``[γ + 1]`` where planning gives every request with a goal what it needs.

    One of many may get there by its own drafts, which throughput alone would not
    verify; so each length is planned as its step will be.
    """
    rows, width = np.flatnonzero(batch.slo_tps), history.shape[1]
    drafting = draft_cost(len(batch.ids), np.arange(width + 1))
    found = np.zeros(width + 1, dtype=np.bool_)
    for length in range(width + 1):
        survival = history[:, :length]
        step = VerifyStep(
            survival,
            batch.base_tokens,
            cost,
            float(drafting[length]),
            slo_tps=batch.slo_tps,
        )
        lens = planner.plan(step).verify_lens if length else np.zeros(len(history), int)
        made = np.arange(length) < lens[:, None]
        tokens = 1.0 + (survival * made).sum(axis=1)
        total = np.array([batch.base_tokens + lens.sum()])
        seconds = float(cost(total)[0]) + float(drafting[length])
        found[length] = (tokens[rows] >= batch.slo_tps[rows] * seconds).all()
    return found

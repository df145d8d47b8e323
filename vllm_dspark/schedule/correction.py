"""Keeping a cost table true from the times that the engine sees.

A table may be stale or foreign to the hour: measured on an idle machine, before a
neighbour came, at another clock rate. Each part of it (points of the step's curve, the
term of the context, points of the drafter's grid) gets a factor, and all factors one
robust filter. They share variance: most of it is common to everything (a machine that
is slower is slower everywhere, where nobody has looked as well), some to the step or to
the drafter, and the rest to neighbours on the curve. So one load corrects the whole
table by the common factor, and what is wrong only at some B is learned there.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_dspark.schedule.cost import SECONDS, SHARES, CostTable
from vllm_dspark.schedule.robust_filter import RobustFilter
from vllm_dspark.schedule.step import Floats

# Standard deviations of the logarithm of the factors, before anything was seen.
_COMMON = 0.7  # a factor of 2 is nothing special
_BY_KIND = 0.3
_LOCAL = 0.3
_PROMPT = 0.25  # of the prompts' share
_REACH = 1.0  # octaves, over which local factors are alike
_MAX_STEP_KNOTS = 24
_MAX_ROWS = 6  # of the drafter's grid
_UPKEEP = 0.25  # positions that 0 positions count as: as far from 1 as 1 from 4
_MATERIAL = 0.02  # relative change of any factor that makes a new snapshot
_URGENT = 0.10  # such a change makes it at once
# Otherwise so many observations pass first, two of a step that drafts: one takes a
# millisecond with all that is planned anew by it, and on a machine that wavers every
# step would make one.
_SNAPSHOT_EVERY = 32
_WINDOW = 256  # observations that `error` looks back on
_MAX_CACHED = 4096
# A factor beyond says that something else is being measured.
_MAX_LOG = math.log(1000.0)


class LiveCost:
    """A cost table and what was learned since about its errors. Not thread-safe.

    Args:
        table: to start from; `snapshot` saved in an earlier run will do.

    Example:
        >>> draft = ((0.001, 0.004),)
        >>> table = CostTable((1, 9), (0.02, 0.04), 0.0, (1,), (0, 7), draft)
        >>> live = LiveCost(table)
        >>> for _ in range(50):
        ...     live.observe(5, 0, 0.06)
        >>> round(float(live.snapshot().step_seconds(5)), 2)
        0.06
    """

    def __init__(self, table: CostTable) -> None:
        self._table = table
        self._knots = _thin(table.tokens, _MAX_STEP_KNOTS)
        self._rows = _thin(table.requests, _MAX_ROWS)
        # Upkeep alone, its neighbour, the last: upkeep says little of drafting.
        self._columns = sorted({*table.positions[:2], table.positions[-1]})
        self._context = len(self._knots)  # index of the context's factor
        prior = self._prior()
        self._prompt = len(prior) - 1  # index of the prompts' share
        place = np.arange(len(prior))
        drafting = (place > self._context) & (place < self._prompt)
        kinds = drafting.astype(np.int64)
        # A machine that is slower reads prompts as much slower as the rest.
        self._filter = RobustFilter(prior, kinds, place == self._prompt)
        # What each observation is of the factors, and the table's own seconds.
        self._steps: dict[int, tuple[Floats, float, int]] = {}
        self._drafts: dict[tuple[int, int], tuple[Floats, float, int]] = {}
        self._at_points = np.stack([self._step_row(b) for b in table.tokens])
        self._at_grid = np.stack(
            [self._draft_row(r, k) for r in table.requests for k in table.positions]
        )
        self._errors: deque[float] = deque(maxlen=_WINDOW)
        self._error = 0, math.nan  # and after how many observations
        self._snapshot = table
        self._snapshot_x = self._filter.x.copy()
        self._snapshot_at = 0
        self.observed = 0

    def observe(
        self,
        batch_tokens: int,
        context_tokens: int,
        seconds: float,
        prompt_tokens: int = 0,
    ) -> float | None:
        """Learn from one target step; what cannot be a step's time is passed over.

        Args:
            batch_tokens: B, at least 1.
            context_tokens: context read by attention, summed over the step's requests.
            seconds: what the step took, drafting not included.
            prompt_tokens: how many of B are of prompts.

        Returns:
            Log of observed / predicted, None if it was passed over.
        """
        if not (batch_tokens >= 1 and _can_be(seconds)):
            return None
        x = self._filter.x
        counted = prompt_tokens * self._share(x)
        tokens = max(round(batch_tokens - prompt_tokens + counted), 1)
        row, base, place = self._step(tokens)
        predicted = base * math.exp(float(row.dot(x)))
        if prompt_tokens:
            wide = max(tokens // 8, 1)
            wider_row, wider, _ = self._step(tokens + wide)
            wider *= math.exp(float(wider_row.dot(x)))
            row = row.copy()
            row[self._prompt] = counted * math.log(wider / predicted) / wide
        if context_tokens > 0 and self._table.per_context_token > 0:
            factor = math.exp(float(x[self._context]))
            reading = self._table.per_context_token * factor * context_tokens
            share = reading / (predicted + reading)
            row = row * (1 - share)
            row[self._context] = share
            predicted += reading
        return self._learn(row, predicted, seconds, place)

    def observe_draft(self, num_reqs: int, positions: int, seconds: float) -> None:
        """Learn from one drafting (0 positions: context K/V upkeep alone)."""
        if not (num_reqs >= 1 and positions >= 0 and _can_be(seconds)):
            return
        found = self._drafts.get((num_reqs, positions))
        if found is None:
            row = self._draft_row(num_reqs, positions)
            base = float(self._table.draft_seconds(num_reqs, positions))
            found = row, base, int(row.argmax())
            _keep(self._drafts, (num_reqs, positions), found)
        row, base, place = found
        predicted = base * math.exp(float(row.dot(self._filter.x)))
        self._learn(row, predicted, seconds, place)

    def snapshot(self) -> CostTable:
        """The corrected table to plan with; the same object until it matters."""
        x, waited = self._filter.x, self.observed - self._snapshot_at
        material = _MATERIAL if waited >= _SNAPSHOT_EVERY else _URGENT
        if float(np.abs(x - self._snapshot_x).max()) > material:
            self._snapshot, self._snapshot_x = self._corrected(), x.copy()
            self._snapshot_at = self.observed
        return self._snapshot

    def error(self) -> float:
        """Median of |predicted / observed - 1| over the last observations, or NaN.

        Predicted is what was known before each observation. Found anew every few.
        """
        at, error = self._error
        if math.isnan(error) or self.observed - at >= _SNAPSHOT_EVERY:
            error = float(np.median(self._errors)) if self._errors else math.nan
            self._error = self.observed, error
        return error

    def _learn(
        self, row: Floats, predicted: float, seconds: float, place: int
    ) -> float:
        self.observed += 1
        self._errors.append(abs(predicted / seconds - 1))
        surprise = math.log(seconds / predicted)
        self._filter.update(row, surprise, place)
        return surprise

    def _corrected(self) -> CostTable:
        table, x = self._table, np.clip(self._filter.x, -_MAX_LOG, _MAX_LOG)
        points = self._at_points
        variance = np.einsum("ij,jk,ik->i", points, self._filter.covariance, points)
        grid = np.exp(self._at_grid @ x).reshape(len(table.requests), -1)
        return CostTable.fit(
            table.tokens,
            np.array(table.step) * np.exp(points @ x),
            table.per_context_token * math.exp(float(x[self._context])),
            table.requests,
            table.positions,
            np.array(table.draft) * grid,
            self._share(x),
            # What was seen holds; its neighbours give way where the order demands it.
            weights=1 / np.maximum(variance, 1e-6),
        )

    def _prior(self) -> Floats:
        """Covariance of the factors: step, context, drafter's grid in rows, prompts."""
        steps = _alike(self._knots)
        apart = [k if k else _UPKEEP for k in self._columns]
        drafts = np.kron(_alike(self._rows), _alike(apart))
        m, n = len(steps), len(steps) + 1 + len(drafts)
        prior = np.zeros((n + 1, n + 1))
        prior[:n, :n] = _COMMON**2
        prior[:m, :m] += _BY_KIND**2 + _LOCAL**2 * steps
        prior[m, m] += _BY_KIND**2 + _LOCAL**2
        prior[m + 1 : n, m + 1 : n] += _BY_KIND**2 + _LOCAL**2 * drafts
        prior[n, n] = _PROMPT**2
        return prior

    def _share(self, x: Floats) -> float:
        """What a prompt's token counts as, of a token of B."""
        share = self._table.prompt_share * math.exp(float(x[self._prompt]))
        return min(max(share, SHARES[0]), SHARES[1])

    def _step(self, batch_tokens: int) -> tuple[Floats, float, int]:
        """What an observation of B is of the factors; the table's seconds; a place."""
        found = self._steps.get(batch_tokens)
        if found is None:
            row = self._step_row(batch_tokens)
            base = float(self._table.step_seconds(batch_tokens))
            found = row, base, int(row.argmax())
            _keep(self._steps, batch_tokens, found)
        return found

    def _step_row(self, batch_tokens: int) -> Floats:
        row = np.zeros(len(self._filter.x))
        row[: self._context] = _between(self._knots, batch_tokens)
        return row

    def _draft_row(self, num_reqs: int, positions: int) -> Floats:
        row = np.zeros(len(self._filter.x))
        columns = _between([k + 1 for k in self._columns], positions + 1)
        row[self._context + 1 : self._prompt] = np.kron(
            _between(self._rows, num_reqs), columns
        )
        return row


def _can_be(seconds: float) -> bool:
    """False also for NaN, and for what a clock that jumps makes of a step."""
    return SECONDS[0] <= seconds <= SECONDS[1]


def _thin(values: Sequence[int], most: int) -> list[int]:
    """At most so many of the values, both ends among them."""
    if len(values) <= most:
        return list(values)
    return [
        values[i] for i in np.linspace(0, len(values) - 1, most).round().astype(int)
    ]


def _alike(at: Sequence[float]) -> Floats:
    """[n, n] correlation of local factors by distance on a logarithmic axis."""
    octaves = np.log2(np.array(at, dtype=np.float64))
    alike: Floats = np.exp(-np.abs(octaves[:, None] - octaves) / _REACH)
    return alike


def _between(knots: Sequence[int], at: int) -> Floats:
    """[n] weights of the knots at a place; linear on a logarithmic axis."""
    octaves = np.log2(np.array(knots, dtype=np.float64))
    unit = np.eye(len(knots))
    place = math.log2(at)
    return np.array([np.interp(place, octaves, one) for one in unit])


def _keep(cache: dict[Any, Any], key: Any, value: Any) -> None:
    if len(cache) >= _MAX_CACHED:
        cache.clear()
    cache[key] = value

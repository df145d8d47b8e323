"""Measuring a cost table in a few seconds, with whatever runs a step handed in.

Points are measured in passes. The first pass goes from small to large, powers of two
before the points between them, and stops growing where the next point would not fit:
beyond it the table extrapolates. Later passes repeat all points in a shuffled order, so
that a machine that slows down meanwhile does not look like a curve, until the budget is
spent. Of three calls of a point or more the first does not count (it may have compiled
or allocated), and of those that do, the lower median: pauses only ever add time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vllm_dspark.schedule.cost import SECONDS, SHARES, CostTable
from vllm_dspark.schedule.profile_points import Limits, Point, choose_points, predict
from vllm_dspark.schedule.step import Floats

PROFILE_SECONDS = 10.0
_FIRST_PASS = 0.45  # of the budget: a second pass must fit, and a few repeats
# A point may seem dearer than a larger one by so much; more is a pause, not noise.
_NOISE = 1.2
_MAX_SAMPLES = 9  # per point: more do not sharpen a median worth the wait

TimeStep = Callable[[int, int], float]
TimePrompt = Callable[[int], float]
TimeDraft = Callable[[int, int], float]


@dataclass(frozen=True)
class Profile:
    """A measured table and how it was measured.

    Args:
        table: the table.
        measured: for the file: seconds spent, samples, points left out, spread (the
            median over the points of median absolute deviation / median).
    """

    table: CostTable
    measured: dict[str, Any]


def profile(
    time_step: TimeStep,
    time_prompt: TimePrompt,
    time_draft: TimeDraft,
    limits: Limits,
    budget: float = PROFILE_SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> Profile:
    """Measure a cost table.

    Args:
        time_step: runs one target step of (batch_tokens, context_tokens), returns its
            seconds.
        time_prompt: the same for a step with so many tokens of one prompt.
        time_draft: runs one drafting for (requests, positions), returns its seconds;
            0 positions is the upkeep of the context K/V alone.
        limits: how far to go.
        budget: seconds on ``clock`` for all of it. A few smallest points are measured
            whatever it is.
        clock: seconds; tests hand in their own.

    Raises:
        ValueError: a callable returned no positive number of seconds.
    """
    session = _Session(time_step, time_prompt, time_draft, budget, clock)
    session.warm_up(limits.positions)
    points = session.first_pass(choose_points(limits))
    session.repeat(points)
    table = _table(points)
    counts = [len(point.samples) for point in points]
    measured = {
        "how": "profiled at start",
        "seconds": round(clock() - session.start, 3),
        "budget_seconds": budget,
        "samples": sum(counts),
        "samples_per_point": [min(counts), max(counts)],
        "batch_tokens": [limits.batch_tokens, table.tokens[-1]],
        "requests": [limits.requests, table.requests[-1]],
        "spread": round(float(np.median([p.spread() for p in points])), 4),
    }
    return Profile(table, measured)


class _Session:
    """The budget, and calls within it."""

    def __init__(
        self,
        time_step: TimeStep,
        time_prompt: TimePrompt,
        time_draft: TimeDraft,
        budget: float,
        clock: Callable[[], float],
    ) -> None:
        self._call: dict[str, TimeStep] = {
            "step": time_step,
            "prompt": lambda tokens, _: time_prompt(tokens),
            "draft": time_draft,
        }
        self._clock = clock
        self._budget = budget
        self.start = clock()

    def _left(self, share: float = 1.0) -> float:
        return share * self._budget - (self._clock() - self.start)

    def warm_up(self, positions: int) -> None:
        """The very first calls pay for everything that is made once: not counted."""
        self._measure(Point("step", 1, 0, True))
        self._measure(Point("draft", 1, positions, True))

    def first_pass(self, points: list[Point]) -> list[Point]:
        """Measure each point that fits once; returns those measured."""
        done: list[Point] = []
        for point in points:
            if point.must or predict(point, done) <= self._left(_FIRST_PASS):
                self._measure(point)
                done.append(point)
        return done

    def repeat(self, points: list[Point]) -> None:
        """Measure all again and again, in changing order, while something fits."""
        random = np.random.default_rng(0)
        for _ in range(_MAX_SAMPLES - 1):
            for i in random.permutation(len(points)):
                if predict(points[i], points) <= self._left():
                    self._measure(points[i])

    def _measure(self, point: Point) -> None:
        before = self._clock()
        seconds = self._call[point.kind](point.x, point.y)
        if not SECONDS[0] <= seconds <= SECONDS[1]:  # NaN is not
            raise ValueError(
                f"time_{point.kind}({point.x}, {point.y}) gave {seconds!r}; expected "
                f"seconds from {SECONDS[0]:g} to {SECONDS[1]:g}"
            )
        point.samples.append(float(seconds))
        point.cost = min(point.cost, self._clock() - before)


def _table(points: list[Point]) -> CostTable:
    curve = {p.x: p.seconds() for p in points if p.kind == "step" and p.y == 0}
    # Slope through the origin of (context, extra seconds); contexts weigh as squares.
    extra = [
        (p.y, p.seconds() - curve[p.x])
        for p in points
        if p.kind == "step" and p.y and p.x in curve
    ]
    slope = sum(c * s for c, s in extra) / sum(c * c for c, _ in extra) if extra else 0
    grid = {(p.x, p.y): p.seconds() for p in points if p.kind == "draft"}
    columns = sorted({k for _, k in grid})
    rows = [r for r in sorted({r for r, _ in grid})
            if all((r, k) in grid for k in columns)]  # fmt: skip
    tokens = sorted(curve)
    table = CostTable.fit(
        tokens,
        _without_pauses([curve[b] for b in tokens]),
        slope,
        rows,
        columns,
        _without_pauses([[grid[r, k] for k in columns] for r in rows]),
    )
    for prompt in points:
        if prompt.kind == "prompt" and prompt.x <= table.tokens[-1]:
            table = replace(table, prompt_share=_share(table, prompt))
    return table


def _share(table: CostTable, prompt: Point) -> float:
    """What one of its tokens counts as: the B whose step takes as long, by tokens.

    At most 1: without context it has nothing to do that others have not.
    """
    as_long = float(np.interp(prompt.seconds(), table.step, table.tokens))
    return min(max(as_long / prompt.x, SHARES[0]), 1.0)


def _without_pauses(seconds: ArrayLike) -> Floats:
    """Cut what lies above a later value, along each axis, by more than noise."""
    y = np.asarray(seconds, dtype=np.float64)
    for axis in range(y.ndim):
        later = np.flip(np.minimum.accumulate(np.flip(y, axis), axis), axis)
        y = np.minimum(y, _NOISE * later)
    return y

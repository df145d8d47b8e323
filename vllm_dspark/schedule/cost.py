"""What a step costs: the table that SPS(B) of the paper (3.2.2, 5.2) is read from.

Two parts, in seconds. The target's step: a curve over B (``batch_tokens``, all tokens
of its forward pass) plus a term proportional to the context tokens that its attention
reads. Tokens of prompts count as less than others: of a prompt only the last one has
logits. The drafter: a grid over requests and positions, where 0 positions is what the
upkeep of the context K/V costs when nothing is drafted.

A table is immutable and knows nothing of how it was measured (`profiler`), where it is
kept (`cost_file`), or how it is kept true (`correction`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vllm_dspark.schedule.isotonic import isotonic, isotonic_grid
from vllm_dspark.schedule.step import Floats, numbers

# What a table may hold. Outside, something went wrong: no step takes a tenth of a
# microsecond or an hour.
SECONDS = (1e-7, 3600.0)
MAX_SLOPE = 1.0  # seconds per context token
SHARES = (0.05, 4.0)  # what a prompt's token may count as, of a token of B
MAX_COORDINATE = 1 << 24  # tokens, requests or positions
MAX_POINTS = 1024  # of the curve, and of the grid
# Up to so many tokens or positions the seconds of each number are kept.
_LOOKED_UP = 2048


@dataclass(frozen=True)
class CostTable:
    """Seconds of the target's step and of drafting.

    Between the points it is linear. Below the first it is constant, since there fixed
    costs rule and a falling line would meet zero. Beyond the last it goes on linearly
    as over the upper half of the range: the last two points alone may be level (two
    that noise had swapped), and tokens beyond them would seem free.

    Args:
        tokens: B of the N ≥ 2 points, increasing, at least 1.
        step: [N] seconds at them without context, positive, never falling.
        per_context_token: seconds for each context token that attention reads.
        requests: of the drafter's grid, increasing, at least 1.
        positions: of the drafter's grid, M ≥ 2 of them, increasing from 0.
        draft: [requests][positions] seconds, positive, never falling along either.
        prompt_share: what a token of a prompt counts as, of a token of B.

    Raises:
        ValueError: something of that does not hold; the message has the value.

    Example:
        >>> draft = ((0.001, 0.004),)
        >>> table = CostTable((1, 9), (0.02, 0.04), 1e-6, (1,), (0, 7), draft)
        >>> [round(float(s), 4) for s in table.step_seconds([1, 5, 17], 1000)]
        [0.021, 0.031, 0.061]
    """

    tokens: tuple[int, ...]
    step: tuple[float, ...]
    per_context_token: float
    requests: tuple[int, ...]
    positions: tuple[int, ...]
    draft: tuple[tuple[float, ...], ...]
    prompt_share: float = 1.0
    # The points as arrays, continued far beyond the last one.
    _x: tuple[Floats, Floats, Floats] = field(init=False, repr=False, compare=False)
    _y: tuple[Floats, Floats] = field(init=False, repr=False, compare=False)
    # What is looked up again and again: the curve at every B, and the drafter's rows.
    _curve: Floats = field(init=False, repr=False, compare=False)
    _drafting: dict[int, Floats] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_axis("tokens", self.tokens, 1, 2)
        _check_axis("requests", self.requests, 1, 1)
        _check_axis("positions", self.positions, 0, 2)
        if self.positions[0] != 0:
            raise ValueError(
                f"positions {self.positions}: must start with 0, the upkeep of the "
                "context K/V when nothing is drafted"
            )
        _check_seconds("step", (self.step,), (1, len(self.tokens)))
        shape = (len(self.requests), len(self.positions))
        _check_seconds("draft", self.draft, shape)
        if not _in_range(self.per_context_token, 0.0, MAX_SLOPE):
            raise ValueError(
                f"per_context_token {self.per_context_token!r:.60}: expected seconds "
                f"from 0 to {MAX_SLOPE:g}"
            )
        if not _in_range(self.prompt_share, *SHARES):
            raise ValueError(
                f"prompt_share {self.prompt_share!r:.60}: expected {SHARES[0]:g} to "
                f"{SHARES[1]:g}"
            )
        x, step = _continue(self.tokens, np.array(self.step))
        rows, grid = _continue(self.requests, np.array(self.draft))
        columns, turned = _continue(self.positions, grid.T)
        object.__setattr__(self, "_x", (x, rows, columns))
        object.__setattr__(self, "_y", (step, turned.T.copy()))
        each = np.arange(_LOOKED_UP + 1)
        object.__setattr__(self, "_curve", np.interp(each, x, step))
        object.__setattr__(self, "_drafting", {})

    @classmethod
    def fit(
        cls,
        tokens: Sequence[int],
        step: ArrayLike,
        per_context_token: float,
        requests: Sequence[int],
        positions: Sequence[int],
        draft: ArrayLike,
        prompt_share: float = 1.0,
        weights: ArrayLike | None = None,
    ) -> CostTable:
        """A table from measured seconds, which noise may have put out of order.

        Args:
            step: [N].
            draft: [requests, positions].
            weights: [N], how much each point of ``step`` is trusted.
        """
        curve = np.clip(isotonic(step, weights), *SECONDS)
        grid = np.clip(isotonic_grid(draft), *SECONDS)
        return cls(
            tuple(tokens),
            tuple(curve.tolist()),
            min(max(per_context_token, 0.0), MAX_SLOPE),
            tuple(requests),
            tuple(positions),
            tuple(tuple(row) for row in grid.tolist()),
            min(max(prompt_share, SHARES[0]), SHARES[1]),
        )

    def counted(self, prompt_tokens: int) -> int:
        """As how many tokens of B so many of prompts count."""
        return round(prompt_tokens * self.prompt_share)

    def uncounted(self, prompt_tokens: int) -> int:
        """Tokens of B that cost nothing, as prompts count less than all of theirs."""
        return prompt_tokens - self.counted(prompt_tokens)

    def step_seconds(
        self, batch_tokens: ArrayLike, context_tokens: ArrayLike = 0
    ) -> Floats:
        """Seconds of the target's forward pass.

        Args:
            batch_tokens: B, any shape.
            context_tokens: context read by attention, summed over the requests of the
                step; broadcast against B.

        Returns:
            Of the broadcast shape, float64, positive, never falling in B.
        """
        at = np.asarray(batch_tokens)
        curve: Floats
        if _indexes(at, _LOOKED_UP):
            curve = self._curve[at]
        else:
            curve = np.interp(at, self._x[0], self._y[0])
        context = np.maximum(np.asarray(context_tokens, dtype=np.float64), 0.0)
        return curve + self.per_context_token * context

    def draft_seconds(self, num_reqs: ArrayLike, positions: ArrayLike) -> Floats:
        """Seconds of drafting, context K/V included; 0 positions is that alone.

        Bilinear between the points of the grid; with a single row (profiled for one
        request only) constant in the requests.

        Args:
            num_reqs: R, any shape.
            positions: positions drafted for each of them; broadcast against R.

        Returns:
            Of the broadcast shape, float64, positive, never falling in either.
        """
        at, last = np.asarray(positions), self.positions[-1]
        if isinstance(num_reqs, int) and _indexes(at, min(last, _LOOKED_UP)):
            row = self._drafting.get(num_reqs)
            if row is None:
                row = self._between(num_reqs, numbers(0, min(last, _LOOKED_UP) + 1))
                self._drafting[num_reqs] = row
            return np.asarray(row[at])
        return self._between(num_reqs, positions)

    def _between(self, num_reqs: ArrayLike, positions: ArrayLike) -> Floats:
        """Bilinear between the points of the drafter's grid."""
        _, rows, columns = self._x
        grid = self._y[1]
        i, u = _locate(rows, num_reqs)
        j, v = _locate(columns, positions)
        low = grid[i, j] * (1 - v) + grid[i, j + 1] * v
        high = grid[i + 1, j] * (1 - v) + grid[i + 1, j + 1] * v
        return np.asarray(low * (1 - u) + high * u)


def _continue(axis: Sequence[int], values: Floats) -> tuple[Floats, Floats]:
    """Add a point far beyond the last one (values go along their first axis)."""
    x = np.array(axis, dtype=np.float64)
    far = x[-1] + 2.0 * MAX_COORDINATE
    # From the last point that is at most half as far out as the end.
    below = max(int(np.searchsorted(x, x[-1] / 2, side="right")) - 1, 0)
    run = x[-1] - x[below]
    slope = (values[-1] - values[below]) / run if run else np.zeros_like(values[-1])
    beyond = values[-1] + slope * (far - x[-1])
    if beyond.ndim:  # lines of different slope cross somewhere: the higher one rules
        beyond = np.maximum.accumulate(beyond)
    x, y = np.append(x, far), np.concatenate([values, beyond[None]])
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _indexes(values: NDArray[Any], last: int) -> bool:
    """Whether all are whole numbers from 0 to ``last``."""
    whole = values.dtype.kind in "iu" and values.size > 0
    return bool(whole and values.min() >= 0 and values.max() <= last)


def _locate(axis: Floats, at: ArrayLike) -> tuple[Any, Floats]:
    """The interval that holds each value, and how far along it the value lies."""
    x = np.maximum(np.asarray(at, dtype=np.float64), axis[0])
    # Short axes; `searchsorted` gives up the interpreter's lock (see `step`).
    below = (axis <= x[..., None]).sum(axis=-1)
    i = np.minimum(below - 1, len(axis) - 2)
    return i, (x - axis[i]) / (axis[i + 1] - axis[i])


def _in_range(value: Any, low: float, high: float) -> bool:
    """Whether it is a number within the limits (NaN is not; huge integers may come)."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and low <= value <= high and math.isfinite(value)


def _check_axis(name: str, axis: Sequence[int], low: int, at_least: int) -> None:
    if not at_least <= len(axis) <= MAX_POINTS:
        raise ValueError(
            f"{name}: {len(axis)} points; expected {at_least} to {MAX_POINTS}"
        )
    for value in axis:
        if not isinstance(value, int) or not _in_range(value, low, MAX_COORDINATE):
            raise ValueError(
                f"{name}: {value!r:.60} is no whole number from {low} to "
                f"{MAX_COORDINATE}"
            )
    for one, other in itertools.pairwise(axis):
        if other <= one:
            raise ValueError(f"{name}: {other} after {one}; they must increase")


def _check_seconds(
    name: str, rows: Sequence[Sequence[float]], shape: tuple[int, int]
) -> None:
    if len(rows) != shape[0] or any(len(row) != shape[1] for row in rows):
        raise ValueError(f"{name}: expected {shape[0]} by {shape[1]} values")
    if shape[0] * shape[1] > MAX_POINTS:
        raise ValueError(
            f"{name}: {shape[0] * shape[1]} points; at most {MAX_POINTS} are allowed"
        )
    for row in rows:
        for value in row:
            if not _in_range(value, *SECONDS):
                raise ValueError(
                    f"{name}: {value!r:.60} is no number of seconds from "
                    f"{SECONDS[0]:g} to {SECONDS[1]:g}"
                )
    values = np.array(rows)
    falls = (np.diff(values, axis=0) < 0).any() or (np.diff(values, axis=1) < 0).any()
    if falls:
        raise ValueError(f"{name}: seconds fall where there is more to do")

"""A made-up machine: true times, noise and pauses, and a clock that they advance."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.step import Floats

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
REQUESTS = (1, 2, 4, 8, 16, 32, 64)
POSITIONS = (0, 1, 4, 7)
SLOPE = 2e-6
SHARE = 0.8  # what a token of a prompt counts as


def step_time(batch_tokens: ArrayLike, context_tokens: ArrayLike = 0) -> Floats:
    """Nearly free up to 6 tokens, then full price: like the demo model's."""
    b = np.asarray(batch_tokens, dtype=np.float64)
    dear = 0.0019 * np.maximum(b - 6, 0)
    return np.asarray(0.025 + 0.0004 * b + dear + SLOPE * np.asarray(context_tokens))


def draft_time(num_reqs: float, positions: float) -> float:
    return 0.002 + 0.0003 * num_reqs + 0.0006 * positions * num_reqs**0.7


def true_table(
    factor: Callable[[Floats], Floats] = np.ones_like, drafts: float = 1.0
) -> CostTable:
    """The table of this machine, or one that is wrong by a factor of B."""
    step = step_time(TOKENS) * factor(np.array(TOKENS, dtype=np.float64))
    grid = [[drafts * draft_time(r, k) for k in POSITIONS] for r in REQUESTS]
    return CostTable.fit(TOKENS, step, SLOPE, REQUESTS, POSITIONS, grid)


class Machine:
    """Runs steps that take time on its own clock.

    Args:
        noise: standard deviation of the times' logarithm.
        pauses: share of the calls that take 20 times as long.
        longest: seconds that a pause adds at most.
        first: seconds that the first call of each shape takes longer.
        start: seconds that the very first call takes longer.
    """

    def __init__(
        self,
        noise: float = 0.0,
        pauses: float = 0.0,
        longest: float = math.inf,
        first: float = 0.0,
        start: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.now = 1000.0
        self.calls: list[tuple[str, int, int]] = []
        self._noise, self._pauses, self._first = noise, pauses, first
        self._longest, self._start = longest, start
        self._random = np.random.default_rng(seed)

    def clock(self) -> float:
        return self.now

    def time_step(self, batch_tokens: int, context_tokens: int) -> float:
        true = float(step_time(batch_tokens, context_tokens))
        return self._run(true, ("step", batch_tokens, context_tokens))

    def time_prompt(self, tokens: int) -> float:
        return self._run(float(step_time(SHARE * tokens)), ("prompt", tokens, 0))

    def time_draft(self, num_reqs: int, positions: int) -> float:
        return self._run(
            draft_time(num_reqs, positions), ("draft", num_reqs, positions)
        )

    def _run(self, true: float, call: tuple[str, int, int]) -> float:
        seconds = self.noisy(true)
        seconds += self._first if call not in self.calls else 0
        seconds += self._start if not self.calls else 0
        self.calls.append(call)
        self.now += seconds
        return seconds

    def noisy(self, true: float) -> float:
        """A time as it would be measured."""
        paused = self._random.random() < self._pauses
        noise = float(np.exp(self._noise * self._random.standard_normal()))
        return true * noise + (min(19 * true, self._longest) if paused else 0)

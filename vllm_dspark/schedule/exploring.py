"""Verifying more than seems to pay, now and then, to learn what it costs.

A plan stops where the next draft seems too dear. Is a point of the cost curve beyond it
too high by mistake (a pause while it was measured), no step gets there, and the mistake
would stay: on a machine that wavers, verification then never passes a made-up corner.

Lossless: how much more is verified follows from earlier steps alone, and which drafts
from their current survivals, as in the planner's asynchronous variant.
"""

from __future__ import annotations

import math

import numpy as np

from vllm_dspark.schedule.goal import goals_of
from vllm_dspark.schedule.planner import Budget
from vllm_dspark.schedule.step import Stop, VerifyStep

# Trimmed steps from one exploring step to the next, and before the first.
_EVERY, _FIRST = 32, 8


class Exploring:
    """When a step verifies more than its plan would, and how much."""

    def __init__(self) -> None:
        self._trimmed = _EVERY - _FIRST  # steps since the last exploring one
        self._share = 0.0  # of its drafts that the last plan verified
        self._all_next = False

    def budget(self, step: VerifyStep) -> Budget | None:
        """What to verify instead of the plan; None in most steps.

        In turn half-way from what the last plan verified to everything (B on a
        logarithmic scale), and everything.
        """
        if self._trimmed < _EVERY:
            return None
        drafts = int(step.available.sum())
        if not drafts or goals_of(step) is not None:
            return None
        self._trimmed, everything = 0, self._all_next
        self._all_next = not everything
        if not everything:
            planned = step.base_tokens + self._share * drafts
            middle = math.sqrt(planned * (step.base_tokens + drafts))
            drafts = min(max(round(middle) - step.base_tokens, 1), drafts)
        return Budget(np.zeros(step.num_reqs, np.int64), drafts, Stop.EXPLORE)

    def saw(self, step: VerifyStep, verified: int) -> None:
        """Take into account what a plan verifies that `budget` did not make."""
        drafts = int(step.available.sum())
        if verified < drafts:
            self._trimmed += 1
            self._share = verified / drafts

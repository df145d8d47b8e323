"""The controller in its asynchronous form (paper, 5.2).

The step is built before its drafts are known: they are still being drawn on the device.
How many of them may be verified is found from confidences of earlier rounds
(`planner.find_budget`); the device then takes those that survive best by their own.
Which these were, and what became of them, arrives later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.schedule import planner
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.draft_length import Lengths
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.facts import Batch
from vllm_dspark.schedule.planner import Budget
from vllm_dspark.schedule.step import Ints, Stop, VerifyStep, candidates


class BudgetController(Controller):
    """A controller that gives budgets instead of verify lengths."""

    _lengths = Lengths.BUDGETED

    def budget(self, batch: Batch, positions: int) -> Budget:
        """How many drafts the step may verify.

        Args:
            batch: the step; its confidences are of *earlier* drafts of the requests.
            positions: drafted at its end, which its round pays for as well.
        """
        step, _ = self._verify_step(batch, positions)
        found = self._budget(step)
        self._count_step(found.reason, len(batch.ids), positions)
        return found

    def _budget(self, step: VerifyStep) -> Budget:
        nothing = np.zeros(step.num_reqs, dtype=np.int64)
        drafts = candidates(step)
        if self.policy.policy == "threshold":
            # So many, not these: which ones reach it is not known yet.
            reach = drafts.inside & (drafts.survival >= self.policy.threshold)
            return Budget(nothing, int(reach.sum()), Stop.THRESHOLD)
        if not self.adapts:
            return Budget(nothing, int(drafts.num_drafts.sum()), Stop.FIXED)
        if (more := self._exploring.budget(step)) is not None:
            return more
        found = planner.find_budget(step)
        first = int(np.minimum(found.reserved, drafts.num_drafts).sum())
        self._exploring.saw(step, first + found.drafts)
        blind = self._choice.reason is Reason.PROBE
        if blind and not (found.drafts or found.reserved.any()):
            # Only outcomes teach: a probe verifies one of each.
            return Budget(np.minimum(drafts.num_drafts, 1), 0, Stop.FIXED)
        return found

    def outcome(
        self,
        ids: Sequence[str],
        temperatures: Sequence[float],
        confidence: NDArray[np.floating[Any]] | None,
        num_drafts: Ints,
        verified: Ints,
    ) -> Prediction:
        """What the drafts of a step were expected to do, now that they are known.

        To be given to `observe`, with what became of them.

        Args:
            ids: the R requests.
            temperatures: ``[R]``.
            confidence: ``[R, k]`` raw confidences of these drafts, NaN where there is
                none; None without a confidence head.
            num_drafts: ``[R]`` drafts that were at hand.
            verified: ``[R]`` of them, by the device's choice.
        """
        self._count_lengths(num_drafts, verified)
        return self.survival.apply(ids, temperatures, confidence)

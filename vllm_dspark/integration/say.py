"""A line in the log, now and then, that says in words what the controller does."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace

from vllm_dspark.metrics import calibration_error
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.facts import Totals

logger = logging.getLogger("vllm_dspark")

INTERVAL = 10.0  # seconds, as vLLM's own statistics


def log_like_vllm() -> None:
    """Our log lines go where vLLM's go; otherwise those of level INFO go nowhere."""
    theirs = logging.getLogger("vllm")
    if not logger.handlers:
        logger.handlers = list(theirs.handlers)
        logger.setLevel(theirs.level)


class Sayer:
    """Logs at most once an interval, and only when steps were made.

    Args:
        controller: whose doings.
        clock: seconds.
    """

    def __init__(
        self, controller: Controller, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._controller, self._clock = controller, clock
        self._next = clock() + INTERVAL
        self._before = replace(controller.totals)
        self._reasons = controller.drafting.counts.copy()

    def say(self) -> None:
        """Called after every step."""
        now = self._clock()
        if now < self._next:
            return
        self._next = now + INTERVAL
        totals = self._controller.totals
        if totals.steps > self._before.steps:
            logger.info("DSpark: %s", self._words(totals, self._before))
        self._before = replace(totals)
        self._reasons = self._controller.drafting.counts.copy()

    def _words(self, now: Totals, then: Totals) -> str:
        rounds, drafted = now.rounds - then.rounds, now.drafted - then.drafted
        verified, trimmed = now.verified - then.verified, now.trimmed - then.trimmed
        accepted = now.accepted - then.accepted
        steps = now.steps - then.steps
        parts = [f"{steps} steps"]
        if rounds:
            promised = 1 + (now.expected - then.expected) / rounds
            parts.append(
                f"{1 + accepted / rounds:.2f} tokens per round, "
                f"{promised:.2f} promised by confidences"
            )
            parts.append(f"{verified / rounds:.1f} drafts verified each")
        parts.append(f"{drafted} drafted, {trimmed} trimmed")
        reasons = self._controller.drafting.counts - self._reasons
        if reasons:
            parts.append(
                "drafting: " + ", ".join(f"{n} {r}" for r, n in reasons.most_common())
            )
        if self._controller.live is not None:
            parts.append(f"step times within {self._controller.live.error():.0%}")
        if not math.isnan(error := calibration_error(self._controller)):
            parts.append(f"calibration error {error:.3f}")
        seconds = now.planner_seconds - then.planner_seconds
        parts.append(f"planned in {1000 * seconds / steps:.2f} ms a step")
        return "; ".join(parts)

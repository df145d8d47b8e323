"""What is told of the controller to those who watch a server: the list, and news of it.

`METRICS` is the one list of names, kinds and labels. `Reporter` says, now and then, by
how much each count has grown since it last did, and what the gauges stand at: growth,
because one message goes to one of several API servers, whose counts are added up. What
becomes of it (Prometheus) is not known here.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.facts import Totals
from vllm_dspark.schedule.step import Stop

PREFIX = "vllm:dspark_"
INTERVAL = 1.0  # seconds between reports of a busy engine
_WINDOW = 10  # reports that windowed gauges look back on

# By metric: a number; or by label's value; or, for a histogram, counts by value.
News = dict[str, Any]


class Kind(StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"  # of lengths, one bucket for each of 0..γ


@dataclass(frozen=True)
class Metric:
    """One metric.

    Args:
        name: after `PREFIX`; a counter's without the ``_total`` that Prometheus adds.
        kind: its type.
        text: for its HELP line.
        label: besides model and engine, "" for none.
    """

    name: str
    kind: Kind
    text: str
    label: str = ""

    @property
    def exposed(self) -> str:
        """Its name on a server's metrics page (a histogram's without suffix)."""
        return PREFIX + self.name + "_total" * (self.kind is Kind.COUNTER)


_C, _G, _H = Kind.COUNTER, Kind.GAUGE, Kind.HISTOGRAM

METRICS = (
    Metric("steps", _C, "Engine steps."),
    Metric("bypassed_steps", _C, "Steps with decoding requests that drafted nothing."),
    Metric(
        "rounds",
        _C,
        "Times that a request emitted tokens in a step that verified drafts or might "
        "have; tokens per round are 1 + accepted / rounds.",
    ),
    Metric("drafted_tokens", _C, "Tokens drafted."),
    Metric("trimmed_tokens", _C, "Drafts that the planner left unverified."),
    Metric("verified_tokens", _C, "Drafts verified by the target."),
    Metric("accepted_tokens", _C, "Drafts accepted."),
    Metric(
        "expected_accepted_tokens",
        _C,
        "What calibrated confidences promised of the verified drafts: the sum of their "
        "survivals, to compare with the accepted ones.",
    ),
    Metric("planner_seconds", _C, "Seconds spent choosing lengths."),
    Metric(
        "steps_by_reason",
        _C,
        "Steps with decoding requests by why they draft as many positions as they do "
        "(adaptive policy).",
        "reason",
    ),
    Metric("steps_by_stop", _C, "Steps by why no further draft is verified.", "stop"),
    Metric("verify_length", _H, "Drafts chosen to be verified, by request and step."),
    Metric("draft_length", _H, "Positions that a step drafts for each request."),
    Metric(
        "accepted_length",
        _G,
        "Tokens per round over the last reports, bonus token included (tau).",
    ),
    Metric(
        "predicted_accepted_length",
        _G,
        "The same as calibrated confidences promised it.",
    ),
    Metric(
        "calibration_error",
        _G,
        "Expected calibration error of survivals over the last steps, by draft "
        "position (0 is the first).",
        "position",
    ),
    Metric(
        "cost_error_ratio",
        _G,
        "Median relative error of predicted step times over the last steps.",
    ),
    Metric("planner_max_seconds", _G, "Longest choice of lengths since the report."),
    Metric(
        "overhead_seconds",
        _G,
        "What a step takes outside the worker, as the planner reckons (a median).",
    ),
)


def labels_of(metric: Metric, width: int) -> tuple[str, ...]:
    """Every value that a metric's label takes, for γ = ``width``."""
    return {
        "reason": tuple(str(r) for r in Reason),
        "stop": tuple(str(s) for s in Stop),
        "position": tuple(str(k) for k in range(width)),
    }.get(metric.label, ())


class Reporter:
    """News of one controller, at most once an interval.

    Args:
        controller: whose doings.
        clock: seconds.
    """

    def __init__(
        self, controller: Controller, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._controller, self._clock = controller, clock
        self._next = -math.inf
        self._told = self._counts()
        # Rounds, accepted and expected at the last reports.
        self._window = deque([(0, 0, 0.0)], maxlen=_WINDOW)
        self._longest = 0.0

    def planned(self, seconds: float) -> None:
        """A step's lengths were chosen in so many seconds.

        Fewer than none, by a clock that went back, are none: a counter that is
        lowered raises, and would end the engine.
        """
        seconds = max(seconds, 0.0)
        self._controller.totals.planner_seconds += seconds
        self._longest = max(self._longest, seconds)

    def take(self, at_once: bool = False) -> News | None:
        """What is new, None if it is not time yet.

        Args:
            at_once: do not wait, nothing may come after.
        """
        now = self._clock()
        due = now >= self._next
        if not (due or at_once):
            return None
        if due:
            self._next = now + INTERVAL
        counts = self._counts()
        news: News = {name: _grown(counts[name], self._told[name]) for name in counts}
        self._told = counts
        news.update(self._gauges(due))
        self._longest = 0.0
        return news

    def _counts(self) -> dict[str, Any]:
        totals = self._controller.totals
        return {
            "steps": totals.steps,
            "bypassed_steps": totals.bypassed_steps,
            "rounds": totals.rounds,
            "drafted_tokens": totals.drafted,
            "trimmed_tokens": totals.trimmed,
            "verified_tokens": totals.verified,
            "accepted_tokens": totals.accepted,
            "expected_accepted_tokens": totals.expected,
            "planner_seconds": totals.planner_seconds,
            "steps_by_reason": _named(self._controller.drafting.counts),
            "steps_by_stop": _named(totals.stops),
            "verify_length": dict(totals.verify_lens),
            "draft_length": dict(totals.draft_lens),
        }

    def _gauges(self, due: bool) -> dict[str, Any]:
        controller = self._controller
        accepted, predicted = self._accepted_lengths(controller.totals, due)
        errors = controller.survival.window.ece().tolist()
        live = controller.live
        return {
            "accepted_length": accepted,
            "predicted_accepted_length": predicted,
            "calibration_error": {str(k): e for k, e in enumerate(errors)},
            "cost_error_ratio": math.nan if live is None else live.error(),
            "planner_max_seconds": self._longest,
            "overhead_seconds": controller.overhead,
        }

    def _accepted_lengths(self, totals: Totals, due: bool) -> tuple[float, float]:
        """τ over the window, and the τ that was promised; NaN without rounds."""
        now = totals.rounds, totals.accepted, totals.expected
        then = self._window[0]
        if due:
            self._window.append(now)
        rounds = now[0] - then[0]
        if not rounds:
            return math.nan, math.nan
        return 1 + (now[1] - then[1]) / rounds, 1 + (now[2] - then[2]) / rounds


def calibration_error(controller: Controller) -> float:
    """ECE over the window and all positions, by how often each was verified; or NaN."""
    window = controller.survival.window
    counts, errors = window.counts(), window.ece()
    if not counts.any():
        return math.nan
    return float(np.nansum(errors * counts) / counts.sum())


def _named(counts: Mapping[Any, int]) -> dict[str, int]:
    return {str(name): count for name, count in counts.items()}


def _grown(now: Any, then: Any) -> Any:
    """By how much a count has grown, or those of several that have."""
    if not isinstance(now, dict):
        return now - then
    grown = {key: count - then.get(key, 0) for key, count in now.items()}
    return {key: count for key, count in grown.items() if count}

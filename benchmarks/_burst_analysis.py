"""How fast lengths follow a jump of load, read from a step log. Knows no servers.

A policy that probes and explores never stands still, so "is where it stays" means: the
running median lies in a band around the median of the last half of the phase. The band
holds nine tenths of that half's own running medians, and is at least `TOLERANCE` wide
to either side. A figure whose band also holds what was before the jump, though not as
its own median, has no steady state to speak of (one client whose answers differ much,
say), and nothing is said of it. Steps that probe are left out, and so is the
verification of what they drafted, in the step after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

WITHIN = 50  # steps in which a jump should have been followed
TOLERANCE = 0.5  # positions, or drafts verified per request
WINDOW = 5  # steps of the running median
_HOLD = 20  # steps that must lie in the band from then on, but for
_OUTSIDE = 0.2  # this share of them
_SHARE = 0.9  # of the steady state's running medians that its band holds
_LOAD = 0.1  # of its clients that a load may lack and yet have arrived

Rows = Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Series:
    """One figure of the policy over a phase.

    Args:
        steps: engine steps since the jump, of the steps that count.
        values: the figure in them.
    """

    steps: np.ndarray
    values: np.ndarray

    @cached_property
    def medians(self) -> np.ndarray:
        """Running median of the last `WINDOW` values, none of the phase before."""
        return np.array(
            [
                np.median(self.values[max(0, i + 1 - WINDOW) : i + 1])
                for i in range(len(self.values))
            ]
        )


def jumps(rows: Rows, loads: Sequence[int], marks: Sequence[float]) -> list[Any]:
    """What came of every change of load.

    Args:
        rows: of the step log.
        loads: clients of each phase.
        marks: when each began, by the log's clock; the last phase ends with the log.

    Returns:
        A dictionary for each phase but the first: the loads, steps of the phase, steps
        until the load had arrived (``load_steps``; prompts come first), and for
        ``positions`` and ``verify_length`` what `settled` gives; ``settled_after``
        counts engine steps from the jump until both are where they stay, None if they
        never are; ``within`` says whether that was soon enough, None where the phase is
        too short or a figure too unsteady to say.

    Raises:
        ValueError: a phase without a step in which requests decode.
    """
    phases = split(rows, marks)
    for load, phase in zip(loads, phases, strict=True):
        if not any(row["requests"] for row in phase):
            raise ValueError(f"no request decoded in the phase with {load} clients")
    found = []
    for i in range(1, len(loads)):
        before, phase = phases[i - 1], phases[i]
        figures = {
            name: settled(series(before, name, None), series(phase, name, before[-1]))
            for name in ("positions", "verify_length")
        }
        after = [figure["settled_after"] for figure in figures.values()]
        late = None if None in after else max(after)
        told = all(figure["moved"] is not None for figure in figures.values())
        judged = told and len(phase) >= 2 * WITHIN
        found.append(
            {
                "from": loads[i - 1],
                "to": loads[i],
                "steps": len(phase),
                "load_steps": _arrival(phase),
                **figures,
                "settled_after": late,
                "within": (late is not None and late <= WITHIN) if judged else None,
            }
        )
    return found


def split(rows: Rows, marks: Sequence[float]) -> list[Rows]:
    """The steps of each phase; those before the first mark belong to none."""
    ends = [*marks[1:], float("inf")]
    return [
        [row for row in rows if start <= row["time"] < end]
        for start, end in zip(marks, ends, strict=True)
    ]


def series(phase: Rows, name: str, before: dict[str, Any] | None) -> Series:
    """``positions`` or ``verify_length`` of the steps that count.

    Args:
        phase: its steps.
        name: which of them.
        before: the step before the phase.
    """
    steps, values = [], []
    for i, row in enumerate(phase):
        previous = phase[i - 1] if i else before
        drafted = row if name == "positions" else previous
        probing = drafted is not None and drafted["reason"] == "probe"
        if not row["requests"] or probing:
            continue
        steps.append(i)
        length = row["verified"] / row["requests"]
        values.append(row["positions"] if name == "positions" else length)
    return Series(np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64))


def steady(figure: Series) -> tuple[float, float]:
    """Median of the last half, and how far its band reaches to either side."""
    half = len(figure.values) // 2
    middle = float(np.median(figure.values[half:]))
    away = np.abs(figure.medians[half:] - middle)
    return middle, max(TOLERANCE, float(np.quantile(away, _SHARE)))


def settled(before: Series, figure: Series) -> dict[str, Any]:
    """When a figure is where it stays.

    Returns:
        ``before`` and ``steady`` (what it was in the phase before, and is in this one),
        ``band`` (see above), ``moved`` (whether there was something to follow; None if
        the figure is too unsteady to say), ``settled_after`` (engine steps since the
        jump; None if never, or too unsteady).
    """
    if not len(figure.values) or not len(before.values):
        return dict.fromkeys(("before", "steady", "band", "moved", "settled_after"))
    (was, _), (middle, band) = steady(before), steady(figure)
    found = {"before": was, "steady": middle, "band": band, "settled_after": None}
    away = abs(middle - was)
    if TOLERANCE < away <= band:
        return {**found, "moved": None}
    inside = np.abs(figure.medians - middle) <= band
    after = None
    for i in np.flatnonzero(inside):
        if inside[i : i + _HOLD].mean() >= 1 - _OUTSIDE:
            after = int(figure.steps[i])
            break
    return {**found, "moved": away > TOLERANCE, "settled_after": after}


def _arrival(phase: Rows) -> int | None:
    """Engine steps until about as many requests decode as later on."""
    requests = np.array([row["requests"] for row in phase])
    usual = float(np.median(requests[len(requests) // 2 :]))
    there = np.abs(requests - usual) <= max(_LOAD * usual, 0.5)
    return int(np.argmax(there)) if there.any() else None

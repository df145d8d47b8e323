"""What the curves of a load sweep promise an operator: capacity at a service level.

A curve is one arm's points by load, straight between neighbours. At a service level it
carries the highest throughput of any place on it that keeps the level. Figures are
medians over rounds; where a curve does not reach, there is none.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

BASE = "none"
# Service levels: figure, how it is named, whether more of it is better.
SPEED = ("tok_s_per_user", "tok/s per user", True)
TTFT = ("ttft_p99_ms", "TTFT p99, ms", False)


@dataclass(frozen=True, slots=True)
class Place:
    """A place on a curve: throughput in tok/s, and the figure of a service level."""

    throughput: float
    level: float


def places(loads: Mapping[str, Mapping[str, Any]], key: str) -> list[Place]:
    """An arm's measured places, by rising load."""
    rows = [loads[load] for load in sorted(loads, key=int)]
    return [
        Place(row["output_throughput"], row[key])
        for row in rows
        if row.get(key) is not None
    ]


def capacity(curve: Sequence[Place], bound: float, at_least: bool) -> float | None:
    """The highest throughput at which the level is kept; None where it never is.

    Args:
        bound: of the level.
        at_least: whether the level must not be below it (else: not above).
    """

    def kept(level: float) -> bool:
        return level >= bound if at_least else level <= bound

    crossings = (
        _between(a.throughput, b.throughput, (bound - a.level) / (b.level - a.level))
        for a, b in _segments(curve)
        if kept(a.level) != kept(b.level)
    )
    found = [p.throughput for p in curve if kept(p.level)]
    return max([*found, *crossings], default=None)


def speed_at(curve: Sequence[Place], throughput: float) -> float | None:
    """The best level (more is better) at which the curve carries a throughput."""
    crossings = (
        _between(
            a.level,
            b.level,
            (throughput - a.throughput) / (b.throughput - a.throughput),
        )
        for a, b in _segments(curve)
        if (a.throughput >= throughput) != (b.throughput >= throughput)
    )
    found = [p.level for p in curve if p.throughput >= throughput]
    return max([*found, *crossings], default=None)


def _segments(curve: Sequence[Place]) -> Iterator[tuple[Place, Place]]:
    return itertools.pairwise(curve)


def _between(a: float, b: float, share: float) -> float:
    return a + share * (b - a)


def anchors(arms: Mapping[str, Any]) -> dict[str, list[float]]:
    """Service levels to look at: those that no speculation keeps at its loads.

    Of speed, a fifth less than it has, so that it can carry each with some load.
    """
    base = arms.get(BASE) or next(iter(arms.values()), {})
    speeds = [0.8 * p.level for p in places(base, SPEED[0])]
    waits = [1.2 * p.level for p in places(base, TTFT[0])]
    return {
        SPEED[0]: [_rounded(v) for v in sorted(set(speeds), reverse=True)],
        TTFT[0]: [_rounded(v) for v in sorted(set(waits))],
    }


def _rounded(value: float) -> float:
    """Two significant digits: a level is what somebody would ask for."""
    return float(f"{value:.2g}")


def at_anchors(
    arms: Mapping[str, Any], levels: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """Throughput at each service level: figure, level, arm."""
    found: dict[str, Any] = {}
    for key, _, at_least in (SPEED, TTFT):
        for level in dict.fromkeys(levels.get(key, ())):
            row = {
                arm: capacity(places(loads, key), level, at_least)
                for arm, loads in arms.items()
            }
            found.setdefault(key, {})[f"{level:g}"] = row
    return found


def matched(arms: Mapping[str, Any]) -> dict[str, Any]:
    """Speed per user against no speculation's at equal throughput: arm, throughput.

    The throughputs are those of no speculation at its loads; where an arm's curve does
    not carry one, it has no figure for it.
    """
    if BASE not in arms:
        return {}
    base = places(arms[BASE], SPEED[0])
    found: dict[str, Any] = {}
    for arm, loads in arms.items():
        curve = places(loads, SPEED[0])
        for place in base:
            theirs = speed_at(base, place.throughput)
            mine = speed_at(curve, place.throughput)
            if mine is not None and theirs:
                key = f"{place.throughput:.4g}"
                found.setdefault(arm, {})[key] = mine / theirs
    return found

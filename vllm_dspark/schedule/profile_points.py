"""What to measure, in which order, and how long a measurement should take."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

# Steps with context are compared with those without at these B, or the nearest.
_CONTEXT_AT = (1, 16)
# Tokens of the prompt that is timed: as many as a step with one has; fewer tell little.
_PROMPT_AT = 256
_LEAST_PROMPT = 16
_MARGIN = 1.15  # a call is started if this much more than foreseen still fits


@dataclass(frozen=True)
class Limits:
    """How far to measure.

    Args:
        batch_tokens: the most tokens of a step, at least 2.
        requests: the most requests drafted for at a time, at least 1.
        positions: γ, the most positions drafted, at least 1.
        context_tokens: the most context tokens (summed over requests) that a step may
            be timed with; 0: no dependence on context is measured.
    """

    batch_tokens: int
    requests: int
    positions: int
    context_tokens: int = 0

    def __post_init__(self) -> None:
        least = {"batch_tokens": 2, "requests": 1, "positions": 1, "context_tokens": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(
                    f"{name} {getattr(self, name)}: profiling needs at least {low}"
                )


@dataclass
class Point:
    """One thing to time: a step (B, context), a prompt (its tokens, 0) or a drafting
    (requests, positions)."""

    kind: Literal["step", "prompt", "draft"]
    x: int
    y: int
    must: bool  # a table cannot do without
    samples: list[float] = field(default_factory=list)
    cost: float = math.inf  # least clock time of a call, set-up included

    def kept(self) -> list[float]:
        """The samples that count, smallest first."""
        return sorted(self.samples[1:] if len(self.samples) > 2 else self.samples)

    def seconds(self) -> float:
        """Their lower median: of two the smaller."""
        kept = self.kept()
        return kept[(len(kept) - 1) // 2]

    def spread(self) -> float:
        kept = np.array(self.kept())
        return float(np.median(np.abs(kept - np.median(kept))) / np.median(kept))


def powers(limit: int) -> list[int]:
    """1, 2, 4, … and ``limit`` itself."""
    return sorted({*(1 << i for i in range(limit.bit_length())), limit})


def midpoints(limit: int) -> list[int]:
    """3, 6, 12, … up to ``limit``: halfway between the powers of two."""
    return [3 << i for i in range(limit.bit_length()) if 3 << i < limit]


def choose_points(limits: Limits) -> list[Point]:
    """All points in the order of the first pass: what a table needs most, first."""
    most = limits.batch_tokens
    steps = [Point("step", b, 0, b <= 2) for b in powers(most)]
    between = [Point("step", b, 0, False) for b in midpoints(most)]
    at = {min(powers(most), key=lambda b: abs(b - x)) for x in _CONTEXT_AT}
    long = limits.context_tokens
    contexts = sorted({long // 2, long} - {0})
    context = [Point("step", b, c, False) for c in contexts for b in sorted(at)]
    γ = limits.positions
    columns = sorted({0, 1, math.ceil(γ / 2), γ})
    grid = [
        Point("draft", r, k, r == 1) for r in powers(limits.requests) for k in columns
    ]
    prompt = [Point("prompt", min(most, _PROMPT_AT), 0, False)]
    prompt = prompt if most >= _LEAST_PROMPT else []
    return [*_alternate(steps, grid, context), *prompt, *between]


def _alternate(*lists: list[Point]) -> list[Point]:
    """The lists in their order, in proportion: none waits for another's end."""
    placed = [(i / len(part), p) for part in lists for i, p in enumerate(part)]
    return [p for _, p in sorted(placed, key=lambda pair: pair[0])]


def predict(point: Point, done: list[Point]) -> float:
    """The most a call should take, with a margin: as smaller ones, in proportion.

    In proportion is an upper bound, since part of each call's time is fixed; the
    lowest bound counts, so that one slow call does not end the pass.
    """
    kind = "step" if point.kind == "prompt" else point.kind
    smaller = [p for p in done if p.kind == kind and p.x <= point.x]
    if point.kind == "step" and point.y:  # context costs what only context tells
        smaller = [p for p in smaller if p.y] or smaller
    return _MARGIN * min(
        (p.cost * point.x / p.x * max(1.0, point.y / max(p.y, 1) if p.y else 1.0)
         for p in smaller),
        default=0.0,
    )  # fmt: skip

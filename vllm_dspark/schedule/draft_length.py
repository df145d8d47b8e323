"""How many positions to draft in the next round (paper, its named limitation).

Drafting is paid for even where nothing is verified; so the choice weighs its cost in,
and 0 positions, a bypass, is among the choices. Lossless with whatever comes out, as
all of it is known before the round's first draft is drawn: ``history`` must come from
earlier rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.schedule.step import (
    Floats,
    Ints,
    StepCost,
    VerifyStep,
    candidates,
    largest,
    numbers,
    round_seconds,
)

# Seconds of drafting for so many requests, by positions [n] → [n]. At 0 positions it
# is what a bypass still costs: the context K/V of the emitted tokens.
DraftCost = Callable[[int, Ints], Floats]


class Lengths(StrEnum):
    """How the verify lengths of a step come about."""

    PLANNED = "planned"  # by `planner.plan`, which a jag of the cost curve stops
    BUDGETED = "budgeted"  # by `planner.find_budget`, whose search goes on behind it
    ALL = "all"  # every draft is verified


@dataclass(frozen=True)
class DraftLength:
    """A choice of draft length and what it was chosen by.

    Args:
        positions: 0..K with the best predicted throughput, the fewest among equals.
        throughput: ``[K + 1]`` Θ by positions, drafting included, in tokens/s.
    """

    positions: int
    throughput: Floats


def best_draft_length(
    history: NDArray[np.floating],
    num_reqs: int,
    base_tokens: int,
    cost: StepCost,
    draft_cost: DraftCost,
    lengths: Lengths = Lengths.PLANNED,
) -> DraftLength:
    """The draft length with the best throughput, drafting paid for.

    For each length the round is predicted with the verify lengths that its own planning
    would choose.

    Args:
        history: ``[R, K]`` mean survivals of earlier rounds by request, or ``[K]`` for
            all alike; entries that are no probability count as 0.
        num_reqs: R.
        base_tokens: as in `VerifyStep`.
        cost: seconds of the target's step by its tokens.
        draft_cost: seconds of drafting.
        lengths: how verify lengths will come about.

    Raises:
        ValueError: ``history`` is for another number of requests, or a cost is no time.
    """
    if history.ndim == 1:
        history = np.broadcast_to(history, (num_reqs, len(history)))
    if history.ndim != 2 or len(history) != num_reqs:
        raise ValueError(
            f"history of shape {history.shape} for {num_reqs} requests: give [R, K], "
            "or [K] for all alike"
        )
    drafts = candidates(VerifyStep(history, base_tokens, cost))
    width = history.shape[1]
    drafting = draft_cost(num_reqs, numbers(0, width + 1))
    if not ((drafting >= 0) & np.isfinite(drafting)).all():
        raise ValueError(f"drafting takes {drafting} seconds: give 0 or more")
    seconds = round_seconds(cost, base_tokens, num_reqs * width)
    order = drafts.ranked(drafts.inside, drafts.survival)
    survival, column = drafts.survival.ravel()[order], order % max(width, 1)
    # All lengths at once, [K + 1, drafts]: what a length leaves out adds nothing.
    made = column < numbers(0, width + 1)[:, None]
    tokens = num_reqs + _from_zero(np.where(made, survival, 0.0))
    speed = tokens / (seconds[_from_zero(made)] + drafting[:, None])
    if lengths is Lengths.ALL:
        throughput = speed[:, -1]
    elif lengths is Lengths.PLANNED:
        stops = np.ones(speed.shape, dtype=np.bool_)  # at the end at the latest
        stops[:, :-1] = made & (speed[:, 1:] <= speed[:, :-1])
        first = np.logical_or.accumulate(stops, axis=1)
        first[:, 1:] ^= first[:, :-1].copy()
        throughput = np.where(first, speed, 0.0).sum(axis=1)
    else:
        throughput = speed.max(axis=1)
    return DraftLength(largest(throughput), throughput)


def _from_zero(values: NDArray[Any]) -> NDArray[Any]:
    """Sums along each row of none, one, … all of its values: ``[.., n + 1]``."""
    sums = np.zeros((len(values), values.shape[1] + 1), np.result_type(values, 0))
    np.cumsum(values, axis=1, out=sums[:, 1:])
    return sums

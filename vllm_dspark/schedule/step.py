"""One step as the planner sees it: what it may know, what it decides, and its ranking.

A step of B tokens takes ``cost(B)`` seconds; verifying a draft adds a token to B.

While a step is planned its device waits, and threads that wait for the interpreter's
lock (the one that sends the last step's output) take it where a numpy call gives it up,
for most of a millisecond. So what plans a small batch gets by without those that do:
sort, argmax, searchsorted, interp, bincount and arange (`numbers`) among them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]


# Drafts up to which Python sorts: beyond, it takes longer than giving up the lock.
_SORTED_HERE = 512
_numbers = np.arange(1024)
_numbers.flags.writeable = False


def numbers(first: int, beyond: int) -> Ints:
    """What `numpy.arange` gives for two numbers from 0, without giving up the lock."""
    if beyond <= len(_numbers):
        return _numbers[first:beyond]
    return np.arange(first, beyond)


def largest(values: Floats) -> int:
    """What `numpy.argmax` gives for ``[n]`` numbers, likewise."""
    found: list[float] = values.tolist()
    return found.index(max(found))


# Seconds of the target's steps by their tokens B, [n] → [n]; they must be positive.
StepCost = Callable[[Ints], Floats]


class Stop(StrEnum):
    """Why no further draft is verified."""

    DROP = "throughput_drop"  # the next one would not have raised Θ
    ALL = "all_drafts"  # there is no further one
    BUDGET = "budget"  # earlier rounds allowed no more
    GOAL = "goal"  # the next one would have cost a request its goal
    GOAL_MISSED = "goal_missed"  # some request is below its goal
    EXPLORE = "explore"  # more than seems to pay, to learn what it costs
    FIXED = "fixed"
    THRESHOLD = "threshold"


@dataclass(frozen=True)
class VerifyStep:
    """All that a decision about one step may know.

    Args:
        survival: ``[R, K]`` calibrated a_k. Entries that are no probability (NaN, say)
            count as 0; so does what follows, as survivals never rise along a request.
        base_tokens: tokens of the step whatever is verified: R anchors, prefill, and
            requests that are not among the R. A request that decodes without drafts
            is a row with ``num_drafts`` 0: then the token it emits counts.
        cost: seconds of the target's step by its tokens.
        extra_seconds: what the round costs besides, such as drafting, already decided.
        num_drafts: ``[R]`` drafts there are, 0..K; None for K each.
        slo_tps: tokens/s that each request shall get, its τ over the round's seconds;
            one for all or ``[R]``, 0 for none.

    Raises:
        ValueError: shapes that do not fit, or a number out of its range.
    """

    survival: NDArray[np.floating]
    base_tokens: int
    cost: StepCost
    extra_seconds: float = 0.0
    num_drafts: NDArray[np.integer] | None = None
    slo_tps: float | NDArray[np.floating] = 0.0

    def __post_init__(self) -> None:
        if self.survival.ndim != 2:
            raise ValueError(f"survival of shape {self.survival.shape}: give [R, K]")
        num_reqs, width = self.survival.shape
        if self.base_tokens < num_reqs:
            raise ValueError(
                f"base_tokens {self.base_tokens} for {num_reqs} requests: each has an "
                "anchor, so give at least as many"
            )
        if not 0 <= self.extra_seconds < np.inf:
            raise ValueError(f"extra_seconds {self.extra_seconds}: give 0 or more")
        n = self.num_drafts
        if n is not None and (n.shape != (num_reqs,) or ((n < 0) | (n > width)).any()):
            raise ValueError(f"num_drafts {n}: give {num_reqs} numbers in 0..{width}")
        slo = self.slo_tps
        if isinstance(slo, np.ndarray):
            fits = slo.shape == (num_reqs,) and bool(
                ((slo >= 0) & (slo < np.inf)).all()
            )
        else:
            fits = 0 <= slo < np.inf
        if not fits:
            raise ValueError(
                f"slo_tps {self.slo_tps}: give one number or {num_reqs}, in tokens/s, "
                "0 for no goal"
            )

    @property
    def num_reqs(self) -> int:
        """R, the rows."""
        return int(self.survival.shape[0])

    @property
    def available(self) -> Ints:
        """``[R]`` drafts there are."""
        if self.num_drafts is None:
            return np.full(self.num_reqs, self.survival.shape[1], dtype=np.int64)
        return self.num_drafts.astype(np.int64)


@dataclass(frozen=True)
class VerifyPlan:
    """What a step verifies and what is expected of it.

    Args:
        verify_lens: ``[R]`` int64, ℓ of each request.
        tokens: expected from the R requests, corrected and bonus tokens included.
        seconds: predicted for the round, extra seconds included; NaN where nothing
            had to be priced.
        reason: why it is not more.
        invalid: survivals that were no probability, among the drafts there are.
    """

    verify_lens: Ints
    tokens: float
    seconds: float
    reason: Stop
    invalid: int

    @property
    def throughput(self) -> float:
        """Θ, tokens per second."""
        return self.tokens / self.seconds

    @property
    def accepted_length(self) -> float:
        """τ, tokens per request; NaN without requests."""
        num_reqs = len(self.verify_lens)
        return self.tokens / num_reqs if num_reqs else float("nan")


@dataclass(frozen=True)
class Candidates:
    """A step's survivals made safe.

    Args:
        survival: ``[R, K]`` in 0..1, never rising along a row, 0 where no draft is.
        inside: ``[R, K]`` bool, where there is a draft.
        num_drafts: ``[R]`` how many of them.
        invalid: entries that were no probability.
    """

    survival: Floats
    inside: Mask
    num_drafts: Ints
    invalid: int

    def after(self, lens: Ints) -> Mask:
        """``[R, K]`` the drafts there are beyond the first ``lens`` of each request."""
        mask: Mask = numbers(0, self.survival.shape[1]) >= lens[:, None]
        return mask & self.inside

    def ranked(self, among: Mask, worth: Floats) -> Ints:
        """Flat indices of the drafts ``among``, by falling ``worth``.

        Ties keep the order of rows and positions: no draft stands before an earlier
        one of its request, nor does a later survival decide between equals.

        Shape: among, worth ``[R, K]``; worth is never negative, nor rises along a row.
        """
        keys, count = np.where(among, -worth, 1.0).ravel(), np.count_nonzero(among)
        if len(keys) > _SORTED_HERE:
            return np.argsort(keys, kind="stable")[:count]
        order = sorted(range(len(keys)), key=keys.tolist().__getitem__)
        return np.array(order[:count], dtype=np.int64)

    def lengths(self, taken: Ints) -> Ints:
        """``[R]`` how many of the flat indices ``taken`` lie in each row."""
        mask = np.zeros(self.survival.size, dtype=np.bool_)
        mask[taken] = True
        counts: Ints = mask.reshape(self.survival.shape).sum(axis=1)
        return counts

    def tokens(self, lens: Ints) -> Floats:
        """``[R]`` expected tokens when ``lens`` drafts are verified."""
        verified = numbers(0, self.survival.shape[1]) < lens[:, None]
        sums: Floats = (self.survival * verified).sum(axis=1)
        return 1.0 + sums


def candidates(step: VerifyStep) -> Candidates:
    """What of a step can be verified, with entries that are no probability as 0."""
    given = np.asarray(step.survival, dtype=np.float64)
    valid = (given >= 0) & (given <= 1)
    num_drafts = step.available
    inside = numbers(0, given.shape[1]) < num_drafts[:, None]
    invalid = int(np.count_nonzero(inside & ~valid))
    survival = np.where(inside & valid, given, 0.0)
    survival = np.minimum.accumulate(survival, axis=1)
    return Candidates(survival, inside, num_drafts, invalid)


def round_seconds(
    cost: StepCost, base_tokens: int, most: int, extra: float = 0.0
) -> Floats:
    """``[most + 1]`` seconds of a round that verifies 0, 1, … ``most`` drafts.

    Raises:
        ValueError: the cost gives something that is not a positive time.
    """
    seconds = cost(numbers(base_tokens, base_tokens + most + 1)) + extra
    if not (seconds.min() > 0 and seconds.max() < np.inf):  # NaN fails as well
        bad = int(np.flatnonzero(~((seconds > 0) & (seconds < np.inf)))[0])
        raise ValueError(
            f"a step of {base_tokens + bad} tokens takes {seconds[bad]} seconds by the "
            "cost curve: profile again"
        )
    return seconds


def first_drop(speed: Floats) -> int:
    """How many steps ``speed`` rises before it first does not."""
    stops = np.flatnonzero(speed[1:] <= speed[:-1])
    return int(stops[0]) if len(stops) else len(speed) - 1

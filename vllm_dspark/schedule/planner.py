"""How many drafts of each request a step verifies (paper, 3.2.2 and 5.2).

The aim is the throughput

    Θ = (R + Σ survival of what is verified) / (seconds of the step + extra seconds)

**Losslessness.** The output keeps the target's distribution only if whether position k
of a request is verified does not depend on x_k, nor on anything drawn after it. c_k is
computed from x_{k-1}, so the request's survivals up to a_k may be used for position k;
a_{k+1} may not, it knows x_k. Survivals of other requests may, on the same terms:
nothing that a decision uses may come from a draft about which it is still open whether
it is verified. Each function keeps to one of these rules:

1. *Judge in order and keep to it* (`plan`, `threshold`). Drafts are judged one after
   the other, those of a request in order, each by what was judged before and its own
   survival. Nothing that comes later revises a judgement: hence the stop at the first
   drop, even where a later draft would make up for it. A plateau stops as well: to go
   on over it, and back to its start if there is no rise, would be such a revision.
2. *Rank by survival, equals by row and position* (`plan`, `plan_within`). Survivals
   fall along a request, so nothing that knows x_k stands before (r, k). An unstable
   sort would let later survivals decide between equals.
3. *A number from elsewhere* (`find_budget`, `fixed`). How many drafts are verified may
   come from any search, if all it knows was drawn before x_1: confidences of earlier
   rounds. Two rounds before is the paper's choice, for the device's sake.

What callers give must obey too. ``num_drafts[r] >= k`` may not depend on x_k: a block
cut before an x_k that a grammar forbids breaks this (`integration.grammar` mends it), a
block cut after it does not, nor does a token limit. Base tokens, costs, goals and
budgets may not depend on any of the step's drafts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from vllm_dspark.schedule.goal import goals_of
from vllm_dspark.schedule.step import (
    Candidates,
    Floats,
    Ints,
    Stop,
    VerifyPlan,
    VerifyStep,
    candidates,
    first_drop,
    round_seconds,
)


@dataclass(frozen=True)
class Budget:
    """How many drafts a step may verify, found without its own confidences.

    Args:
        reserved: ``[R]`` drafts set aside for requests with goals; else zeros.
        drafts: further ones, for whichever current survivals are best.
        reason: why it is not more.
    """

    reserved: Ints
    drafts: int
    reason: Stop


def plan(step: VerifyStep) -> VerifyPlan:
    """Algorithm 1: the best throughput by current confidences (3.2.2).

    Optimal where Θ has one peak along falling survival, as it has on convex costs. With
    goals, requests that are behind theirs come first (`Goals.reserve`), and what
    follows may bring the goals no further away; if one is missed the reason says so.

    Args:
        step: with current survivals.

    Example:
        >>> step = VerifyStep(np.array([[0.9, 0.2]]), 1, lambda b: 3.0 + b)
        >>> plan(step).verify_lens  # Θ = 1/4, 1.9/5, 2.1/6
        array([1])
    """
    drafts = candidates(step)
    seconds, goals = _seconds(step, drafts), goals_of(step)
    reserved, among = np.zeros_like(drafts.num_drafts), drafts.inside
    if goals:
        reserved = goals.reserve(drafts, seconds)
        seconds, among = seconds[reserved.sum() :], drafts.after(reserved)
    order = drafts.ranked(among, drafts.survival)
    expected = _expected(drafts, reserved, order)
    count = first_drop(expected / seconds)
    reason = Stop.DROP if count < len(order) else Stop.ALL
    if goals:
        attained = goals.along(drafts, reserved, order[:count], seconds[: count + 1])
        falls = np.flatnonzero(attained < attained[0])
        if len(falls):
            count, reason = int(falls[0]) - 1, Stop.GOAL
        if attained[count] < len(goals.rows):
            reason = Stop.GOAL_MISSED
    lens = reserved + drafts.lengths(order[:count])
    return VerifyPlan(
        lens, float(expected[count]), float(seconds[count]), reason, drafts.invalid
    )


def find_budget(earlier: VerifyStep) -> Budget:
    """The asynchronous variant's budget: a global search on any cost curve (5.2).

    Args:
        earlier: the coming step, with survivals that *earlier* rounds (or averages)
            give for its requests. From its own survivals the output would be biased.
    """
    drafts = candidates(earlier)
    seconds, goals = _seconds(earlier, drafts), goals_of(earlier)
    reserved, among = np.zeros_like(drafts.num_drafts), drafts.inside
    if goals:
        reserved = goals.reserve_nearest(drafts, seconds)
        seconds, among = seconds[reserved.sum() :], drafts.after(reserved)
    order = drafts.ranked(among, drafts.survival)
    speed = _expected(drafts, reserved, order) / seconds
    count, reason = int(np.argmax(speed)), Stop.BUDGET
    if goals:
        attained = goals.along(drafts, reserved, order, seconds)
        if attained[count] < attained[0]:
            speed = np.where(attained < attained[0], -1.0, speed)
            count, reason = int(np.argmax(speed)), Stop.GOAL
        if attained[count] < len(goals.rows):
            reason = Stop.GOAL_MISSED
    return Budget(reserved, count, reason)


def plan_within(step: VerifyStep, budget: Budget) -> VerifyPlan:
    """The best current survivals that a budget has room for (5.2).

    Args:
        step: with current survivals; its goals are in the budget.
        budget: from `find_budget`, for the same rows.

    Raises:
        ValueError: a budget for another number of requests.
    """
    if budget.reserved.shape != (step.num_reqs,):
        raise ValueError(
            f"a budget for {len(budget.reserved)} requests, a step of {step.num_reqs}: "
            "find the budget for the rows of this step"
        )
    drafts = candidates(step)
    reserved = np.minimum(budget.reserved, drafts.num_drafts)
    order = drafts.ranked(drafts.after(reserved), drafts.survival)
    everything = budget.drafts >= len(order)
    missed = budget.reason is Stop.GOAL_MISSED
    reason = Stop.ALL if everything and not missed else budget.reason
    lens = reserved + drafts.lengths(order[: budget.drafts])
    return _priced(step, drafts, lens, reason)


def nothing(step: VerifyStep) -> VerifyPlan:
    """The plan of a step without drafts: there is nothing to choose."""
    seconds = _price(step, 0)
    missed = step.num_reqs > 0 and bool(np.any(1.0 / seconds < step.slo_tps))
    reason = Stop.GOAL_MISSED if missed else Stop.ALL
    return replace(unpriced(step.num_reqs), seconds=seconds, reason=reason)


def unpriced(num_reqs: int) -> VerifyPlan:
    """The same for so many requests without goals, in no time: what it takes is NaN."""
    lens = np.zeros(num_reqs, dtype=np.int64)
    return VerifyPlan(lens, float(num_reqs), math.nan, Stop.ALL, 0)


def fixed(step: VerifyStep, length: int | None = None) -> VerifyPlan:
    """Verify so many drafts of each request, None for all; goals are not looked at."""
    if length is not None and length < 0:
        raise ValueError(f"length {length}: give 0 or more, or None for all drafts")
    drafts = candidates(step)
    most = drafts.num_drafts
    lens = most if length is None else np.minimum(most, length)
    return _priced(step, drafts, lens, Stop.FIXED)


def threshold(step: VerifyStep, least: float) -> VerifyPlan:
    """Verify the drafts of survival ``least`` or more (the paper's Figure 5).

    Args:
        step: with current survivals; goals are not looked at.
        least: 0..1; 0 verifies everything.
    """
    if not 0 <= least <= 1:
        raise ValueError(f"threshold {least}: give a probability, 0 to verify all")
    drafts = candidates(step)
    reaching: Ints = (drafts.survival >= least).sum(axis=1)
    lens = np.minimum(reaching, drafts.num_drafts)
    return _priced(step, drafts, lens, Stop.THRESHOLD)


def _seconds(step: VerifyStep, drafts: Candidates) -> Floats:
    most = int(drafts.num_drafts.sum())
    return round_seconds(step.cost, step.base_tokens, most, step.extra_seconds)


def _price(step: VerifyStep, verified: int) -> float:
    """Seconds of the round with so many drafts verified."""
    batch_tokens = step.base_tokens + verified
    return float(round_seconds(step.cost, batch_tokens, 0, step.extra_seconds)[0])


def _expected(drafts: Candidates, reserved: Ints, order: Ints) -> Floats:
    """``[n + 1]`` tokens with the first 0, 1, … n of ``order`` verified."""
    gains = np.empty(len(order) + 1)
    gains[0] = drafts.tokens(reserved).sum() if reserved.any() else len(reserved)
    gains[1:] = drafts.survival.ravel()[order]
    return gains.cumsum()


def _priced(
    step: VerifyStep, drafts: Candidates, lens: Ints, reason: Stop
) -> VerifyPlan:
    seconds = _price(step, int(lens.sum()))
    tokens = float(drafts.tokens(lens).sum())
    return VerifyPlan(lens, tokens, seconds, reason, drafts.invalid)

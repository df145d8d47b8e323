"""Goals for single requests: so many tokens per second each, at the least cost.

How far a request has its goal is min(1, τ / (goal · seconds)), and what counts is the
sum of that. As long as all are behind, raising it is raising the throughput, so a goal
that nobody can reach changes nothing; once all have theirs it cannot rise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dspark.schedule.step import Candidates, Floats, Ints, VerifyStep, first_drop

# Drafts judged at a time. With 256 requests their table just stays below the size from
# which glibc takes fresh pages for every array.
_PORTION = 48


@dataclass(frozen=True)
class Goals:
    """The requests with a goal.

    Args:
        rows: ``[G]`` their rows.
        tps: ``[G]`` tokens per second, positive.
    """

    rows: Ints
    tps: Floats

    def along(
        self,
        drafts: Candidates,
        lens: Ints,
        order: Ints,
        seconds: Floats,
        cap: Floats | float = 1.0,
    ) -> Floats:
        """How far the goals are reached when ``order`` is verified besides ``lens``.

        Args:
            drafts: what there is.
            lens: ``[R]`` drafts verified anyway.
            order: ``[n]`` flat indices of further ones.
            seconds: ``[n + 1]`` of the round with the first 0, 1, … of them.
            cap: what a goal counts at most, one for all or ``[G, 1]``.

        Returns:
            ``[n + 1]``; G exactly where all goals are reached.
        """
        row = order // max(drafts.survival.shape[1], 1)
        gains = np.zeros((len(lens), len(order) + 1))
        gains[:, 0] = drafts.tokens(lens)
        gains[row, np.arange(1, len(order) + 1)] = drafts.survival.ravel()[order]
        share = gains[self.rows].cumsum(axis=1) / (self.tps[:, None] * seconds)
        total: Floats = np.minimum(share, cap).sum(axis=0)
        return total

    def reserve(self, drafts: Candidates, seconds: Floats) -> Ints:
        """Lengths ``[R]`` that bring the requests nearer to their goals.

        Requests that are behind come first, those drafts first that bring their request
        furthest, up to the first that brings the goals no nearer: as in `planner.plan`,
        nothing later revises that. What a request needs grows with the step, hence
        portion by portion.

        Args:
            drafts: what there is.
            seconds: ``[n + 1]`` of a round with 0, 1, … drafts.
        """
        lens, taken = np.zeros_like(drafts.num_drafts), 0
        while len(order := self._behind(drafts, lens, seconds[taken])):
            times = seconds[taken : taken + len(order) + 1]
            # A draft that takes its request over the goal counts whole: else the last
            # little step of many would look too dear, and all would miss it.
            behind = drafts.tokens(lens)[self.rows] < self.tps * times[0]
            cap = np.where(behind, np.inf, 1.0)[:, None]
            count = first_drop(self.along(drafts, lens, order, times, cap))
            lens, taken = lens + drafts.lengths(order[:count]), taken + count
            if count < len(order):
                break
        return lens

    def reserve_nearest(self, drafts: Candidates, seconds: Floats) -> Ints:
        """The best that `reserve` could have stopped at; not for current survivals."""
        lens = best = np.zeros_like(drafts.num_drafts)
        taken, most = 0, -1.0
        while len(order := self._behind(drafts, lens, seconds[taken])):
            times = seconds[taken : taken + len(order) + 1]
            attained = self.along(drafts, lens, order, times)
            count = int(np.argmax(attained))
            if attained[count] > most:
                most, best = attained[count], lens + drafts.lengths(order[:count])
            lens, taken = lens + drafts.lengths(order), taken + len(order)
        return best

    def _behind(self, drafts: Candidates, lens: Ints, seconds: np.float64) -> Ints:
        """A portion of the drafts after ``lens`` that requests behind their goals need.

        The best gain for a goal first, as flat indices; ties as in `Candidates.ranked`.
        """
        needed, weight = np.zeros(len(lens)), np.zeros(len(lens))
        needed[self.rows], weight[self.rows] = self.tps * seconds, 1 / self.tps
        # What comes before a draft, not the draft, decides whether it is needed.
        before = 1.0 + np.cumsum(np.pad(drafts.survival, ((0, 0), (1, 0))), 1)[:, :-1]
        among = drafts.after(lens) & (before < needed[:, None])
        return drafts.ranked(among, drafts.survival * weight[:, None])[:_PORTION]


def goals_of(step: VerifyStep) -> Goals | None:
    """The goals of a step, None if nobody has one."""
    if not isinstance(step.slo_tps, np.ndarray) and step.slo_tps == 0:
        return None  # the usual case, at no cost
    tps = np.broadcast_to(np.asarray(step.slo_tps, np.float64), (step.num_reqs,))
    rows = np.flatnonzero(tps > 0)
    return Goals(rows, tps[rows]) if len(rows) else None

"""When a bypass is interrupted to learn whether drafting pays again.

Without drafts there are no outcomes, and a bypass would justify itself for ever. So
every so often a few rounds are drafted; each time in vain doubles the interval, up to
a limit. What a probe finds reaches the predictions through the survival estimate; a
probe that brings them closer to break-even goes on, because a drafter that has become
good again is not seen to be so in a few rounds.
"""

from __future__ import annotations

import math

from vllm_dspark.schedule.drafting_options import DraftingOptions


class Probes:
    """Timer and judge of the probes of one bypass after the other."""

    def __init__(self, options: DraftingOptions) -> None:
        self._options = options
        self._interval = options.probe_interval
        self._waited = 0  # steps of bypass since there were outcomes
        self.started = 0
        self.running = False
        self._steps = self._rounds = 0
        self._distance = 0.0  # log throughput that drafting lacks, when last judged

    def bypassing(self, drafted_steps: int) -> None:
        """A bypass begins after so many steps of drafting."""
        options = self._options
        if drafted_steps < 4 * options.probe_interval:
            self._interval = min(2 * self._interval, options.max_probe_interval)
        else:
            self._interval = options.probe_interval
        self._waited = 0

    def due(self, load_jumped: bool) -> bool:
        """Whether to start a probe in this step of bypass.

        Another load makes an early one worth while, unless the last is fresh.
        """
        self._waited += 1
        if load_jumped:
            fresh = max(self._options.probe_interval, self._interval // 4)
            return self._waited >= fresh
        return self._waited >= self._interval

    def start(self, gain: float) -> None:
        """Start one; ``gain`` is the best draft length's log throughput over bypass."""
        self.started += 1
        self.running = True
        self._steps = self._rounds = 0
        self._distance = -gain

    def cancel(self) -> None:
        """The load has become another; what the probe learned is in the estimate."""
        self.running = False
        self._waited = 0

    def goes_on(self, rounds: int, gain: float) -> bool:
        """Take a step of a running probe in; False when it is over.

        Args:
            rounds: outcomes that came in.
            gain: as predicted with them.
        """
        options = self._options
        self._steps += 1
        self._rounds += rounds
        late = self._steps >= options.max_probe_steps
        if self._rounds < options.probe_rounds and not late:
            return True
        pays = gain > math.log1p(options.margin)
        closing = -gain <= (1 - options.encouraging) * self._distance
        if closing and not pays and not late:
            self._rounds, self._distance = 0, -gain
            return True
        self.running = False
        self._waited = 0
        longer = min(2 * self._interval, options.max_probe_interval)
        self._interval = options.probe_interval if closing else longer
        return False

"""Puts what serving taught about step costs back into the cache, for the next start.

When the engine runs out of work, now and then, and when it shuts down: `vllm serve`
kills its engine right after asking it to end, unless told to wait
(``--shutdown-timeout``), so that the end alone would often come too late.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.correction import LiveCost
from vllm_dspark.schedule.cost_file import AXES, CostFile, path_of, reach

MIN_OBSERVATIONS = 256  # new ones, without which there is nothing worth keeping
MAX_ERROR = 0.5  # of its predictions lately: a table that is further out is no news
INTERVAL = 60.0  # seconds between two savings of an engine that is often idle


class CostKeeper:
    """Keeps one engine's table; what goes wrong is said once, and then left alone.

    Args:
        root: of the cache.
        content: what the engine started with.
        live: what corrects it.
        clock: seconds.
    """

    def __init__(
        self,
        root: Path,
        content: CostFile,
        live: LiveCost,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._root, self._content, self._live = root, content, live
        self._clock = clock
        self._next = -math.inf
        self._observed = 0  # of `live`, when the table was last kept
        self._failed = False

    def idle(self) -> None:
        """Called whenever there is no work left."""
        if self._clock() >= self._next:
            self.keep()

    def keep(self) -> None:
        """Save the table as it is corrected now, if enough was seen since it last was.

        One whose predictions are still poor is not saved: what disturbed the steps of
        this run may be gone in the next, and a curve of the wrong form is learned
        anew more slowly than it is profiled.

        A table in the cache that reaches further stays: an engine for more requests
        has measured it meanwhile, and would have to do so again.
        """
        new = self._live.observed - self._observed
        if self._failed or new < MIN_OBSERVATIONS:
            return
        self._next = self._clock() + INTERVAL
        if not self._live.error() <= MAX_ERROR:
            return
        self._observed = self._live.observed
        if self._is_short():
            return
        before = self._content.measured.get("live_observations")
        seen = new + (before if isinstance(before, int) else 0)
        measured = {**self._content.measured, "live_observations": seen}
        table = self._live.snapshot()
        self._content = replace(self._content, table=table, measured=measured)
        self._failed = cost_file.save(self._root, self._content) is None

    def _is_short(self) -> bool:
        """Whether the cache has a table that goes further than ours."""
        try:
            there = cost_file.read(path_of(self._root, self._content.key))
        except ValueError:  # none or a damaged one
            return False
        return any(reach(there, name) > reach(self._content, name) for name in AXES)

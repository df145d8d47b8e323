"""Context K/V that is put off while nobody reads it.

In a bypass the drafter's context K/V must stay complete, or drafts would be worse
afterwards and at prefix-cache hits. But only a draft reads it: until the next one, the
features are kept and written together, which takes half the time per token with many
requests and a fiftieth with one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

# Writes features [n, taps·d] at positions [n] to slots [n].
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Rows kept at most: beyond, a row gets no cheaper (measured on two cores), and a step
# that writes them all takes noticeably longer.
MAX_ROWS = 512


class ContextWriter:
    """Writes context K/V now or later, always in the order of the steps.

    Args:
        write: the drafter's.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._kept: list[Rows] = []
        self.rows = 0  # that are kept
        self._row_seconds = 0.0  # when many were last written together
        self._owed = 0.0

    def add(self, rows: Rows, read_next: bool) -> None:
        """Take a step's rows.

        Args:
            rows: features, positions and slots (-1: not stored) of the step's final
                tokens. The features may be no buffer of vLLM's; what is kept of the
                others is copied.
            read_next: False if nothing is drafted in this step.
        """
        features, positions, slots = rows
        new, kept = len(slots), self.rows
        self.rows += new
        self._owed = self._row_seconds * new
        if not read_next and self.rows <= MAX_ROWS:
            self._kept.append((features, positions.clone(), slots.clone()))
            return
        self._kept.append(rows)
        start = time.perf_counter()
        self.flush()
        seconds = time.perf_counter() - start
        self._owed = -seconds * kept / max(kept + new, 1)
        if kept:
            self._row_seconds = seconds / (kept + new)

    def take_owed(self) -> float:
        """Seconds that the last step put off; negative: spent for steps before it."""
        owed, self._owed = self._owed, 0.0
        return owed

    def flush(self) -> None:
        """Write what is kept."""
        kept, self._kept, self.rows = self._kept, [], 0
        if len(kept) == 1:
            features, positions, slots = kept[0]
        else:
            features, positions, slots = map(torch.cat, zip(*kept, strict=True))
            # A slot that meanwhile went to another request is the last one's: two
            # rows for one slot in one call would be written in any order.
            last = torch.from_numpy(_last_of_each(slots.cpu().numpy()))
            last = last.to(slots.device)
            features, positions, slots = features[last], positions[last], slots[last]
        if len(slots):
            self._write(features, positions, slots)


def _last_of_each(slots: np.ndarray) -> np.ndarray:
    """Indices of the last row of each slot, in order; rows without a slot left out."""
    _, first = np.unique(slots[::-1], return_index=True)
    last = np.sort(len(slots) - 1 - first)
    return last[slots[last] >= 0]

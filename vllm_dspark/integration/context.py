"""Context K/V that is put off while nobody reads it.

In a bypass the drafter's context K/V must stay complete, or drafts would be worse
afterwards and at prefix-cache hits. But only a draft reads it, and only that of its own
request: until then features are kept, and written together, which takes half the time
per token with many requests and a fiftieth with one. What nobody can read any more
(its request has ended and no prefix cache holds its block, or the slot is another's by
now) is never written at all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch

from vllm_dspark.integration.kept_rows import KeptRows, Rows

# Writes features [n, taps·d] at positions [n] to slots [n].
Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]

# Rows written together: with more, a row gets no cheaper (measured on two cores).
ROWS_AT_ONCE = 512
# Fewer rows take nearly as long as these: no measure of what a row takes among many.
_FEW_ROWS = 64
# Rows that the shares of written ones are counted over, about.
_WINDOW = 16384
_NONE = np.empty(0, dtype=np.int64)


class ContextWriter:
    """Writes context K/V now or later; what is read is always there.

    Args:
        write: the drafter's.
        capacity: rows kept at most; 0 writes everything at once.
        block_size: slots of a block.
        wanted: of slots, [n] bool: whether anybody may still read them. None: all.
    """

    def __init__(
        self,
        write: Write,
        capacity: int,
        block_size: int,
        wanted: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self._write = write
        self._kept = KeptRows(capacity, block_size)
        self._wanted = wanted
        self._row_seconds = 0.0  # when many are written together, as far as is known
        self._owed = 0.0
        self._written, self._dropped = 1.0, 0.0  # of what was put off, lately

    @property
    def rows(self) -> int:
        """Rows that are kept."""
        return self._kept.rows

    def add(self, rows: Rows, read: np.ndarray | None) -> None:
        """Take a step's rows.

        Args:
            rows: features, positions and slots (-1: not stored) of the step's final
                tokens. What is kept of them is copied.
            read: blocks that this step's drafts read; None: nothing is drafted, and
                the rows may wait.
        """
        if read is not None and not self.rows:  # the usual case where drafts pay
            self._owed = -self._write_all(_NONE, rows)
            return
        slots = rows[2].cpu().numpy()
        self._drop(self._kept.of_slots(slots))
        if read is None and 0 < self._kept.capacity >= len(slots):
            self._put_off(rows, slots)
            return
        earlier = _NONE if read is None else self._kept.of_blocks(read)
        self._owed = -self._write_all(earlier, rows)

    def take_owed(self) -> float:
        """Seconds that the last step put off; negative: spent for steps before it."""
        owed, self._owed = self._owed, 0.0
        return owed

    def _put_off(self, rows: Rows, slots: np.ndarray) -> None:
        stored = np.flatnonzero(slots >= 0)
        if len(stored) < len(slots):
            index = torch.from_numpy(stored).to(rows[2].device)
            rows = (rows[0][index], rows[1][index], rows[2][index])
            slots = slots[stored]
        spent = self._make_room(len(slots))
        self._kept.put(rows, slots)
        share = self._written / (self._written + self._dropped)
        self._owed = self._row_seconds * share * len(slots) - spent

    def _make_room(self, rows: int) -> float:
        """Free the next places; seconds that it took to write what is still wanted."""
        if not len(self._kept.oldest(rows)):
            return 0.0
        many = min(ROWS_AT_ONCE, self._kept.capacity // 2)
        oldest = self._kept.oldest(max(rows, many))
        if self._wanted is not None:
            wanted = self._wanted(self._kept.slots(oldest))
            self._drop(oldest[~wanted])
            oldest = oldest[wanted]
        return self._write_all(oldest, None)

    def _write_all(self, places: np.ndarray, rows: Rows | None) -> float:
        """Write kept rows, and a step's own with the last of them.

        Returns:
            Seconds spent for the kept ones.
        """
        start = time.perf_counter()
        new = 0 if rows is None else len(rows[2])
        for first in range(0, max(len(places), 1), ROWS_AT_ONCE):
            part = places[first : first + ROWS_AT_ONCE]
            parts = [self._kept.rows_at(part)] if len(part) else []
            if new and first + ROWS_AT_ONCE >= len(places):
                assert rows is not None
                parts.append(rows)
            if len(parts) == 1:
                self._write(*parts[0])
            elif parts:
                features, positions, slots = map(torch.cat, zip(*parts, strict=True))
                self._write(features, positions, slots)
        seconds = time.perf_counter() - start
        self._kept.forget(places)
        self._count(len(places), 0)
        if not len(places):
            return 0.0
        per_row = seconds / (len(places) + new)
        few = 0 < self._row_seconds < per_row and len(places) + new < _FEW_ROWS
        if not few:
            self._row_seconds = per_row
        return per_row * len(places)

    def _drop(self, places: np.ndarray) -> None:
        self._kept.forget(places)
        self._count(0, len(places))

    def _count(self, written: int, dropped: int) -> None:
        self._written += written
        self._dropped += dropped
        if self._written + self._dropped > _WINDOW:
            self._written, self._dropped = self._written / 2, self._dropped / 2

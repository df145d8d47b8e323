"""Features that wait to become context K/V, found by the slot they are for.

A ring: new rows take the places of the oldest, and the first places when nothing is
kept, so that bypasses which soon end touch no more memory than they fill. On the device
lie the features and positions; which slot each place is for is known on the host.
"""

from __future__ import annotations

import numpy as np
import torch

# Features [n, taps·d], positions [n], slots [n] (-1: not stored).
Rows = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

_NOTHING = -1


class KeptRows:
    """At most ``capacity`` rows, one for a slot.

    Args:
        capacity: places of the ring.
        block_size: slots of a block.
    """

    def __init__(self, capacity: int, block_size: int) -> None:
        self.capacity = capacity
        self.rows = 0  # that are kept
        self._block_size = block_size
        self._features = self._positions = torch.empty(0)
        self._slots = np.full(capacity, _NOTHING)  # by place
        self._places = np.full((0, block_size), _NOTHING)  # by block and offset
        self._next = 0  # place that is filled next

    def put(self, rows: Rows, slots: np.ndarray) -> None:
        """Copy rows into the next places, which must be free.

        Args:
            rows: no more than there are places.
            slots: theirs, on the host; each once, and none that has a row here.
        """
        features, positions, _ = rows
        if not len(self._features):
            self._features = features.new_empty((self.capacity, features.shape[1]))
            self._positions = positions.new_empty(self.capacity)
        start, n = self._next, len(slots)
        first = min(n, self.capacity - start)
        for part, place in ((slice(first), start), (slice(first, n), 0)):
            length = len(slots[part])
            self._features[place : place + length] = features[part]
            self._positions[place : place + length] = positions[part]
        self._enter(slots, (start + np.arange(n)) % self.capacity)
        self._next = (start + n) % self.capacity

    def oldest(self, n: int) -> np.ndarray:
        """Places with a row among the next ``n`` to be filled, the oldest first."""
        places = (self._next + np.arange(min(n, self.capacity))) % self.capacity
        return places[self._slots[places] != _NOTHING]

    def of_slots(self, slots: np.ndarray) -> np.ndarray:
        """Places of the rows that these slots have here."""
        blocks, offsets = np.divmod(slots, self._block_size)
        known = (slots >= 0) & (blocks < len(self._places))
        places = self._places[blocks[known], offsets[known]]
        return places[places != _NOTHING]

    def of_blocks(self, blocks: np.ndarray) -> np.ndarray:
        """Places of the rows that the slots of these blocks have here."""
        blocks = np.unique(blocks)
        places = self._places[blocks[blocks < len(self._places)]].ravel()
        return places[places != _NOTHING]

    def slots(self, places: np.ndarray) -> np.ndarray:
        """Slots of the rows at these places."""
        return self._slots[places]

    def rows_at(self, places: np.ndarray) -> Rows:
        """Copies of the rows at these places."""
        device = self._features.device
        index = torch.from_numpy(places).to(device)
        slots = torch.from_numpy(self._slots[places]).to(device)
        return self._features[index], self._positions[index], slots

    def forget(self, places: np.ndarray) -> None:
        """Free places that have rows."""
        blocks, offsets = np.divmod(self._slots[places], self._block_size)
        self._places[blocks, offsets] = _NOTHING
        self._slots[places] = _NOTHING
        self.rows -= len(places)
        if not self.rows:
            self._next = 0

    def _enter(self, slots: np.ndarray, places: np.ndarray) -> None:
        blocks, offsets = np.divmod(slots, self._block_size)
        missing = int(blocks.max(initial=0)) + 1 - len(self._places)
        if missing > 0:
            more = np.full((missing, self._block_size), _NOTHING)
            self._places = np.concatenate([self._places, more])
        self._places[blocks, offsets] = places
        self._slots[places] = slots
        self.rows += len(places)

"""Context K/V put off: the same cache in the end, and times told apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_dspark.integration import context
from vllm_dspark.integration.context import MAX_ROWS, ContextWriter, Rows


class Cache:
    """Slots that hold what was written last; fails for a slot twice in one call."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[float, int]] = {}
        self.calls: list[int] = []

    def write(
        self, features: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor
    ) -> None:
        stored = [s for s in slots.tolist() if s >= 0]
        assert len(set(stored)) == len(stored)
        self.calls.append(len(slots))
        rows = zip(slots.tolist(), features, positions.tolist(), strict=True)
        for slot, feature, position in rows:
            if slot >= 0:
                self.slots[slot] = float(feature[0]), position


def rows(number: int, slots: list[int]) -> Rows:
    features = torch.full((len(slots), 2), float(number))
    return features, torch.arange(len(slots)), torch.tensor(slots, dtype=torch.int64)


def test_the_cache_is_that_of_a_writer_that_never_waits() -> None:
    random = np.random.default_rng(0)
    late, at_once = Cache(), Cache()
    writer = ContextWriter(late.write)
    for step in range(300):
        # Few slots: blocks change hands all the time; -1 is stored nowhere.
        slots = random.choice(40, random.integers(0, 9), replace=False).tolist()
        slots += [-1] * int(random.integers(0, 3))
        reads = bool(random.random() < 0.1)
        writer.add(rows(step, slots), read_next=reads)
        at_once.write(*rows(step, slots))
        if reads:
            assert late.slots == at_once.slots
            assert writer.rows == 0
    assert len(late.calls) < 0.2 * len(at_once.calls)


def test_what_is_read_in_every_step_is_written_in_every_step() -> None:
    cache = Cache()
    writer = ContextWriter(cache.write)
    for step in range(5):
        writer.add(rows(step, [step]), read_next=True)
        assert cache.slots[step] == (float(step), 0)
        assert writer.take_owed() == 0
    assert cache.calls == [1] * 5


def test_what_is_kept_is_no_buffer() -> None:
    """Positions and slots are the runner's, which writes the next step's into them."""
    cache = Cache()
    writer = ContextWriter(cache.write)
    features, positions, slots = rows(1, [4, 5])
    writer.add((features, positions, slots), read_next=False)
    positions.fill_(9)
    slots.fill_(8)
    writer.flush()
    assert cache.slots == {4: (1.0, 0), 5: (1.0, 1)}


def test_no_more_is_kept_than_allowed() -> None:
    cache = Cache()
    writer = ContextWriter(cache.write)
    for step in range(MAX_ROWS):
        writer.add(rows(step, [2 * step, 2 * step + 1]), read_next=False)
        assert writer.rows <= MAX_ROWS
    assert max(cache.calls) <= MAX_ROWS + 2
    assert len(cache.slots) + writer.rows == 2 * MAX_ROWS


def test_each_step_is_charged_for_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond a row, whenever it is spent."""
    now = [0.0]
    monkeypatch.setattr(context.time, "perf_counter", lambda: now[0])

    def write(features: torch.Tensor, *_: torch.Tensor) -> None:
        now[0] += 0.001 * len(features)

    writer = ContextWriter(write)

    def charged(slots: list[int], read_next: bool) -> float:
        before = now[0]
        writer.add(rows(0, slots), read_next)
        return now[0] - before + writer.take_owed()

    for slot in (11, 13, 15):
        assert (
            charged([slot, slot + 1], False) == 0
        )  # nobody knows yet what a row takes
    assert charged([3, 4, 5], True) == pytest.approx(0.003)
    for slot in (6, 7):
        assert charged([slot, slot + 2], False) == pytest.approx(0.002)
    assert charged([10], True) == pytest.approx(0.001)

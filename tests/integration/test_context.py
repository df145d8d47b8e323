"""Context K/V put off: what is read is there, what nobody reads is not written."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_dspark.integration import context
from vllm_dspark.integration.context import ROWS_AT_ONCE, ContextWriter
from vllm_dspark.integration.kept_rows import KeptRows, Rows
from vllm_dspark.integration.upkeep import blocks_read

BLOCK = 4
NOTHING = np.empty(0, dtype=np.int64)


class Cache:
    """Slots that hold what was written last; fails for a slot twice in one call."""

    def __init__(self) -> None:
        self.slots: dict[int, tuple[float, int]] = {}
        self.calls: list[int] = []

    @property
    def rows(self) -> int:
        return sum(self.calls)

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

    def of(self, blocks: np.ndarray) -> dict[int, tuple[float, int]]:
        """What these blocks hold."""
        return {s: row for s, row in self.slots.items() if s // BLOCK in blocks}


def rows(number: int, slots: list[int]) -> Rows:
    features = torch.full((len(slots), 2), float(number))
    return features, torch.arange(len(slots)), torch.tensor(slots, dtype=torch.int64)


@pytest.mark.parametrize("capacity", [0, 7, 40, 1000])
def test_what_is_read_is_there(capacity: int) -> None:
    random = np.random.default_rng(0)
    late, at_once = Cache(), Cache()
    writer = ContextWriter(late.write, capacity, BLOCK)
    for step in range(600):
        # Few slots: blocks change hands all the time; -1 is stored nowhere.
        slots = random.choice(60, random.integers(0, 13), replace=False).tolist()
        slots += [-1] * int(random.integers(0, 3))
        at_once.write(*rows(step, slots))
        if random.random() < 0.8:
            writer.add(rows(step, slots), None)
            continue
        read = random.choice(60 // BLOCK, random.integers(0, 6))  # some of them twice
        writer.add(rows(step, slots), read)
        assert late.of(read) == at_once.of(read)
        # A step's own rows are written with what is read.
        assert {s: late.slots[s] for s in slots if s >= 0} == {
            s: at_once.slots[s] for s in slots if s >= 0
        }
    writer.add(rows(600, []), np.arange(60))
    assert late.slots == at_once.slots and writer.rows == 0
    if capacity == 1000:
        assert late.rows < 0.7 * at_once.rows  # slots that were another's by then


def test_what_nobody_can_read_is_not_written() -> None:
    """Requests of 8 blocks each come and go; the last two are unfinished."""
    cache, held = Cache(), np.arange(0)
    writer = ContextWriter(
        cache.write, 200, BLOCK, lambda slots: np.isin(slots // BLOCK, held)
    )
    for request in range(40):
        blocks = np.arange(8 * request, 8 * request + 8)
        held = np.concatenate([blocks - 8, blocks])
        for slot in range(blocks[0] * BLOCK, (blocks[-1] + 1) * BLOCK):
            writer.add(rows(request, [slot]), None)
    assert cache.rows == 0
    writer.add(rows(40, []), held)
    assert sorted(cache.slots) == [s for b in held for s in range(4 * b, 4 * b + 4)]
    # While a prefix cache holds all of them, none is lost.
    cache = Cache()
    writer = ContextWriter(cache.write, 200, BLOCK)
    for slot in range(40 * 8 * BLOCK):
        writer.add(rows(slot, [slot]), None)
    assert len(cache.slots) + writer.rows == 40 * 8 * BLOCK


def test_what_is_read_in_every_step_is_written_in_every_step() -> None:
    cache = Cache()
    writer = ContextWriter(cache.write, 512, BLOCK)
    for step in range(5):
        writer.add(rows(step, [step]), np.array([step // BLOCK]))
        assert cache.slots[step] == (float(step), 0)
        assert writer.take_owed() == 0
    assert cache.calls == [1] * 5


def test_only_what_is_read_is_written() -> None:
    cache = Cache()
    writer = ContextWriter(cache.write, 512, BLOCK)
    for step in range(BLOCK):
        writer.add(rows(step, [step, 20 + step]), None)
    writer.add(rows(9, [BLOCK]), np.array([0, 1]))
    assert sorted(cache.slots) == [0, 1, 2, 3, 4] and writer.rows == BLOCK
    assert cache.calls == [5]


def test_what_is_kept_is_no_buffer() -> None:
    """Positions and slots are the runner's, which writes the next step's into them."""
    cache = Cache()
    writer = ContextWriter(cache.write, 512, BLOCK)
    features, positions, slots = rows(1, [4, 5])
    writer.add((features, positions, slots), None)
    positions.fill_(9)
    slots.fill_(8)
    features.fill_(7)
    writer.add(rows(2, []), np.array([1]))
    assert cache.slots == {4: (1.0, 0), 5: (1.0, 1)}


@pytest.mark.parametrize("step_rows", [1, 3, 700])
def test_no_more_is_kept_than_allowed(step_rows: int) -> None:
    cache = Cache()
    writer = ContextWriter(cache.write, 1000, BLOCK)
    for step in range(2500 // step_rows):
        slots = list(range(step_rows * step, step_rows * (step + 1)))
        writer.add(rows(step, slots), None)
        assert writer.rows <= 1000
    assert max(cache.calls) <= ROWS_AT_ONCE
    assert len(cache.slots) + writer.rows == step_rows * (2500 // step_rows)


def test_a_step_of_more_rows_than_there_are_places() -> None:
    cache = Cache()
    writer = ContextWriter(cache.write, 4, BLOCK)
    writer.add(rows(0, [1]), None)
    writer.add(rows(1, [1, 2, 3, 4, 5]), None)
    assert cache.slots == {s: (1.0, s - 1) for s in range(1, 6)} and writer.rows == 0


def test_the_first_places_are_filled_again_when_nothing_is_kept() -> None:
    kept = KeptRows(100, BLOCK)
    for step in range(50):
        slots = np.arange(3) + 3 * step
        kept.put(rows(step, slots.tolist()), slots)
        assert kept.of_slots(slots).tolist() == [0, 1, 2]
        assert len(kept.oldest(97)) == 0 and len(kept.oldest(100)) == 3
        kept.forget(kept.of_slots(slots))


def test_each_step_is_charged_for_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A millisecond a row, whenever it is spent."""
    now = [0.0]
    monkeypatch.setattr(context.time, "perf_counter", lambda: now[0])

    def write(features: torch.Tensor, *_: torch.Tensor) -> None:
        now[0] += 0.001 * len(features)

    writer = ContextWriter(write, 512, BLOCK)

    def charged(slots: list[int], read: np.ndarray | None) -> float:
        before = now[0]
        writer.add(rows(0, slots), read)
        return now[0] - before + writer.take_owed()

    for slot in (11, 13, 15):
        assert charged([slot, slot + 1], None) == 0  # nobody knows what a row takes
    assert charged([3, 5], np.arange(5)) == pytest.approx(0.002)
    written = 1 + 6
    for slot in (6, 8):
        assert charged([slot, slot + 1], None) == pytest.approx(0.002)
    # Four of eleven rows are never written: the next one is put off for less.
    writer.add(rows(0, [6, 7, 8, 9]), NOTHING)
    assert charged([10], None) == pytest.approx(0.001 * written / (written + 4))


def test_rows_that_wait_are_charged_as_many_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half a second each time, and a millisecond a row."""
    now = [0.0]
    monkeypatch.setattr(context.time, "perf_counter", lambda: now[0])

    def write(features: torch.Tensor, *_: torch.Tensor) -> None:
        now[0] += 0.5 + 0.001 * len(features)

    writer = ContextWriter(write, 4096, BLOCK)

    def written_together(count: int) -> float:
        """What one more row is charged for after so many were written."""
        writer.add(rows(0, list(range(count))), None)
        writer.add(rows(1, []), np.arange(count // BLOCK + 1))
        writer.add(rows(2, [0]), None)
        owed = writer.take_owed()
        writer.add(rows(3, []), np.arange(1))
        return owed

    assert written_together(10) == pytest.approx(0.051)  # all that is known
    assert written_together(500) == pytest.approx(0.002)
    assert written_together(10) == pytest.approx(0.002)  # few say nothing of many
    assert written_together(100) == pytest.approx(0.006)


def test_blocks_that_are_read() -> None:
    table = torch.tensor([[5, 6, 7], [8, 9, 0], [1, 2, 3]], dtype=torch.int32)
    found = blocks_read(table, np.array([0, 2]), np.array([9, 8]), BLOCK)
    assert sorted(found.tolist()) == [1, 2, 5, 6, 7]
    found = blocks_read(table, np.array([1]), np.array([0]), BLOCK)
    assert found.tolist() == []

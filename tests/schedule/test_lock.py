"""Planning a small batch gives up no interpreter lock (see `schedule.step`)."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from tests.schedule.simulated import DEMO, WIDTH
from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.facts import Batch

CALLS = 2000


class Taken:
    """Counts how often another thread that always wants the lock gets it."""

    def __init__(self) -> None:
        self.count, self._stop = 0, False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop:
            self.count += 1
            time.sleep(0)  # gives it back

    def during(self, calls: Callable[[], object]) -> int:
        before = self.count
        for _ in range(CALLS):
            calls()
        return self.count - before

    def __enter__(self) -> Taken:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop = True
        self._thread.join()


@pytest.fixture(autouse=True)
def nobody_is_forced() -> Iterator[None]:
    """The lock is not taken away from a thread that has it for long."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(60.0)
    yield
    sys.setswitchinterval(before)


def batch(num_reqs: int) -> Batch:
    return Batch(
        tuple(map(str, range(num_reqs))),
        (0.0, 1.0) * (num_reqs // 2) + (0.0,) * (num_reqs % 2),
        np.full(num_reqs, WIDTH),
        np.linspace(0.9, 0.3, num_reqs * WIDTH).reshape(num_reqs, WIDTH),
        0,
        100 * num_reqs,
        np.zeros(num_reqs),
    )


def test_a_call_that_gives_up_the_lock_is_seen() -> None:
    with Taken() as taken:
        assert taken.during(lambda: np.sort(np.arange(5000))) > 0


@pytest.mark.parametrize("num_reqs", [1, 5, 16, 60])
def test_the_lock_is_kept_from_the_outcome_to_the_next_step(num_reqs: int) -> None:
    controller, step = Controller(WIDTH), batch(num_reqs)
    controller.price(DEMO)
    lens = np.full(num_reqs, WIDTH)
    while controller.drafting.starting:
        controller.draft(step)
        _, made = controller.verify(step, WIDTH)
        assert made is not None
        controller.observe(made, lens, lens // 2, np.ones(num_reqs, dtype=np.int64))
    controller.foresee(step)

    def plan() -> None:
        choice = controller.draft(step)
        controller.verify(step, choice.positions)

    with Taken() as taken:
        planned = 0
        for _ in range(CALLS):
            before = taken.count
            plan()
            planned += taken.count - before
            controller.foresee(step)
    assert planned == 0
    assert len(controller.totals.verify_lens) > 0

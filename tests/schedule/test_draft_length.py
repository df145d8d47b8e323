"""How many positions to draft: all lengths tried by hand, and the bypass."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.schedule.curves import best_speed, curve
from vllm_dspark.schedule.draft_length import Lengths, best_draft_length
from vllm_dspark.schedule.step import Floats, Ints, VerifyStep


def dear(num_reqs: int, positions: Ints) -> Floats:
    """Upkeep, and a pass of the drafter if there is anything to draft."""
    return 0.1 + np.where(positions > 0, 0.5 + 0.02 * num_reqs * positions, 0.0)


def test_against_all_lengths_and_plans() -> None:
    random = np.random.default_rng(0)
    chosen = []
    for _ in range(150):
        shape = tuple(random.integers(1, 4, size=2))
        history = np.cumprod(random.uniform(0.4, 1.0, shape), axis=1)
        # As deep for each length as its own best plan, on stairs and on a slope.
        stairs = np.arange(16) // int(random.integers(1, 5))
        seconds = 1.0 + random.uniform(0.0, 0.4) * stairs
        found = best_draft_length(
            history, shape[0], shape[0] + 1, curve(seconds), dear, Lengths.BUDGETED
        )
        by_hand = [
            best_speed(
                VerifyStep(
                    history[:, :k],
                    shape[0] + 1,
                    curve(seconds),
                    float(dear(shape[0], np.array(k))),
                )
            )
            for k in range(shape[1] + 1)
        ]
        assert found.throughput == pytest.approx(by_hand)
        assert found.positions == int(np.argmax(by_hand))
        chosen.append(found.positions)
    assert all(chosen.count(k) >= 10 for k in range(4))


def test_bypass_when_drafting_costs_more_than_it_brings() -> None:
    history = np.array([0.6, 0.3, 0.1])
    flat = curve([1.0] * 9)
    cheap = best_draft_length(history, 1, 1, flat, lambda reqs, k: 0.01 * k)
    assert cheap.positions == 3
    assert cheap.throughput == pytest.approx([1, 1.6 / 1.01, 1.9 / 1.02, 2 / 1.03])
    # 1/1 against 2/2.06 at best.
    costly = best_draft_length(history, 1, 1, flat, lambda reqs, k: 1.02 * (k > 0))
    assert costly.positions == 0
    # Upkeep has to be paid either way, so the same drafting pays again: 1/2, 2/2.02.
    upkeep = best_draft_length(history, 1, 1, flat, lambda reqs, k: 1 + 0.02 * (k > 0))
    assert upkeep.positions == 3


def test_fewest_positions_among_equals() -> None:
    history = np.array([0.5, 0.0, 0.0])
    found = best_draft_length(history, 1, 1, curve([1.0] * 5), lambda reqs, k: 0.0 * k)
    assert found.positions == 1


def test_history_of_each_request_or_of_all() -> None:
    history = np.array([0.6, 0.3])
    cost = curve(1.0 + 0.1 * np.arange(20))
    one = best_draft_length(history, 4, 6, cost, dear)
    each = best_draft_length(np.tile(history, (4, 1)), 4, 6, cost, dear)
    assert one.positions == each.positions
    assert one.throughput.tolist() == each.throughput.tolist()
    assert len(set(one.throughput.tolist())) == 3


def test_early_stop_predicts_what_plan_would_do() -> None:
    # The first draft does not pay, two would: `plan` verifies none, so why draft?
    history, cost = np.array([0.9, 0.8]), curve([1.0, 2.0, 2.0])
    free = lambda reqs, k: 0.0 * k  # noqa: E731
    assert best_draft_length(history, 1, 1, cost, free).positions == 0
    found = best_draft_length(history, 1, 1, cost, free, Lengths.BUDGETED)
    assert found.positions == 2


def test_more_load_drafts_less() -> None:
    history = np.cumprod(np.full(7, 0.75))
    positions = [
        best_draft_length(history, n, n, lambda b: 20.0 + b, dear).positions
        for n in (1, 4, 16, 64, 256)
    ]
    assert positions == sorted(positions, reverse=True)
    assert positions[0] == 7 and positions[-1] == 0


@pytest.mark.parametrize("shape", [(0, 4), (0, 0), (3, 0)])
def test_nothing_to_draft(shape: tuple[int, int]) -> None:
    found = best_draft_length(np.zeros(shape), shape[0], 9, curve([1.0] * 30), dear)
    assert found.positions == 0 and len(found.throughput) == shape[1] + 1


def test_nan_history_counts_as_zero() -> None:
    found = best_draft_length(
        np.array([0.9, math.nan, 0.9]), 1, 1, curve([1.0] * 5), lambda reqs, k: 0.0 * k
    )
    assert found.positions == 1


def test_errors() -> None:
    flat = curve([1.0] * 9)
    for history in (np.zeros((2, 3)), np.zeros((1, 2, 3)), np.zeros(())):
        with pytest.raises(ValueError, match=r"history of shape .* for 1 requests"):
            best_draft_length(history, 1, 1, flat, dear)
    for seconds in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="drafting takes"):
            best_draft_length(
                np.zeros(2), 1, 1, flat, lambda reqs, k, s=seconds: s + 0.0 * k
            )


def test_where_all_drafts_are_verified_they_are_all_paid_for() -> None:
    history = np.array([[0.9, 0.5], [0.4, 0.1]])
    cost = curve(1.0 + 0.5 * np.arange(12))  # of 1, 2, … tokens
    found = best_draft_length(history, 2, 3, cost, dear, Lengths.ALL)
    by_hand = [
        (2 + history[:, :k].sum()) / (1.0 + 0.5 * (2 + 2 * k) + dear(2, np.array(k)))
        for k in range(3)
    ]
    np.testing.assert_allclose(found.throughput, by_hand)
    trimmed = best_draft_length(history, 2, 3, cost, dear, Lengths.BUDGETED)
    assert (trimmed.throughput >= found.throughput).all()

"""CostTable: between, beside and beyond its points; what it refuses."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from tests.schedule.machine import true_table
from vllm_dspark.schedule.cost import MAX_POINTS, CostTable

TABLE = CostTable(
    tokens=(1, 2, 4, 8),
    step=(0.010, 0.012, 0.014, 0.022),
    per_context_token=1e-6,
    requests=(1, 4),
    positions=(0, 2, 6),
    draft=((0.001, 0.003, 0.005), (0.002, 0.006, 0.012)),
)


def test_steps_between_and_beyond_the_points() -> None:
    b = [1, 2, 3, 4, 6, 8]
    expected = [0.010, 0.012, 0.013, 0.014, 0.018, 0.022]
    np.testing.assert_allclose(TABLE.step_seconds(b), expected)
    # Beyond: on as over the upper half of the range, from 4 to 8; before: level.
    np.testing.assert_allclose(TABLE.step_seconds([12, 1008]), [0.030, 2.022])
    np.testing.assert_allclose(TABLE.step_seconds([0, -5]), [0.010, 0.010])


def test_points_that_noise_swapped_do_not_make_the_rest_free() -> None:
    table = CostTable.fit((64, 96, 128), (1, 3.2, 3.0), 0, (1,), (0, 1), [[1, 1]])
    assert table.step == (1, 3.1, 3.1)
    assert table.step_seconds(192) == pytest.approx(3.1 + 2.1)


def test_context_adds() -> None:
    both = TABLE.step_seconds([[1], [8]], [0, 1000, 2000])
    np.testing.assert_allclose(both[0], [0.010, 0.011, 0.012])
    np.testing.assert_allclose(both[1], [0.022, 0.023, 0.024])
    assert TABLE.step_seconds(1, -5) == pytest.approx(0.010)


def test_drafts_between_and_beyond_the_points() -> None:
    assert TABLE.draft_seconds(1, 0) == pytest.approx(0.001)
    assert TABLE.draft_seconds(4, 6) == pytest.approx(0.012)
    assert TABLE.draft_seconds(2.5, 1) == pytest.approx((0.002 + 0.004) / 2)
    # Beyond, along each axis: from 1 to 4 requests, and from 2 to 6 positions.
    assert TABLE.draft_seconds(7, 6) == pytest.approx(0.019)
    assert TABLE.draft_seconds(4, 10) == pytest.approx(0.018)
    assert TABLE.draft_seconds(0, -1) == pytest.approx(0.001)
    assert TABLE.draft_seconds([[1], [4]], [0, 2, 6]).tolist() == [
        pytest.approx(row) for row in TABLE.draft
    ]


def test_one_row_is_for_any_number_of_requests() -> None:
    table = replace(TABLE, requests=(1,), draft=((0.001, 0.003, 0.005),))
    np.testing.assert_allclose(table.draft_seconds([1, 50], 6), 0.005)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_was_measured_it_is_positive_and_rises(seed: int) -> None:
    random = np.random.default_rng(seed)
    tokens = np.unique(random.integers(1, 500, 12)).tolist()
    step = random.exponential(0.01, len(tokens)) + 1e-9
    grid = random.exponential(0.01, (4, 3)) + 1e-9
    table = CostTable.fit(tokens, step, -1e-6, (1, 3, 9, 20), (0, 2, 7), grid)
    assert table.per_context_token == 0
    b = np.arange(0, 2000)
    seconds = table.step_seconds(b, 1e9)
    assert (seconds > 0).all() and (np.diff(seconds) >= 0).all()
    at = np.arange(0, 60)
    drafts = table.draft_seconds(at[:, None], at)
    assert (drafts > 0).all() and drafts.shape == (60, 60)
    assert min(np.diff(drafts, axis=0).min(), np.diff(drafts, axis=1).min()) > -1e-12


def test_scalars_arrays_and_equality() -> None:
    assert TABLE.step_seconds(3).shape == () and TABLE.draft_seconds(3, 2).shape == ()
    same, other = replace(TABLE), replace(TABLE, per_context_token=0.0)
    assert same == TABLE and hash(same) == hash(TABLE) and other != TABLE
    with pytest.raises(FrozenInstanceError):
        TABLE.tokens = (1, 2)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"tokens": (1, 2, 2, 8)}, "tokens: 2 after 2"),
        ({"tokens": (8, 4, 2, 1)}, "must increase"),
        ({"tokens": (0, 2, 4, 8)}, "tokens: 0 is no whole number"),
        ({"tokens": (1, 2.5, 4, 8)}, "2.5 is no whole number"),
        ({"tokens": (True, 2, 4, 8)}, "True is no whole number"),
        ({"tokens": (1,), "step": (0.1,)}, "tokens: 1 points; expected 2"),
        ({"tokens": (1, 2, 4, 10**400)}, "no whole number"),
        ({"tokens": tuple(range(1, MAX_POINTS + 3))}, "points; expected"),
        ({"step": (0.01, 0.02, 0.03)}, "step: expected 1 by 4"),
        ({"step": (0.01, 0.02, 0.015, 0.03)}, "step: seconds fall"),
        ({"step": (-0.01, 0.02, 0.02, 0.03)}, "-0.01 is no number of seconds"),
        ({"step": (0, 0.02, 0.02, 0.03)}, "0 is no number of seconds"),
        ({"step": (0.01, math.nan, 0.02, 0.03)}, "nan is no number of seconds"),
        ({"step": (0.01, 0.01, 0.02, math.inf)}, "inf is no number of seconds"),
        ({"step": (0.01, 0.01, 0.02, 10**400)}, "no number of seconds"),
        ({"step": (0.01, 0.01, 0.02, "1")}, "'1' is no number of seconds"),
        ({"per_context_token": -1e-9}, "per_context_token -1e-09"),
        ({"per_context_token": math.nan}, "per_context_token nan"),
        ({"per_context_token": None}, "per_context_token None"),
        ({"prompt_share": 0.0}, "prompt_share 0.0"),
        ({"prompt_share": math.nan}, "prompt_share nan"),
        ({"positions": (1, 2, 6)}, "must start with 0"),
        ({"draft": ((0.001, 0.003, 0.005),)}, "draft: expected 2 by 3"),
        ({"draft": ((0.1, 0.2, 0.3), (0.1, 0.1, 0.3))}, "draft: seconds fall"),
        ({"draft": ((0.1, 0.3, 0.2), (0.4, 0.4, 0.4))}, "draft: seconds fall"),
    ],
)
def test_refused(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(TABLE, **changes)


def test_a_table_of_the_machine_gives_its_times() -> None:
    table = true_table()
    assert table.step_seconds(20) == pytest.approx(0.025 + 0.008 + 0.0019 * 14)

"""The uniform numbers of seeded requests, without an engine.

A seeded request's text is only as good as these: equidistribution (also of the low
bits), independence of purposes, of neighbouring positions and of neighbouring seeds
(users count 0, 1, 2, …), and values that do not depend on what else is in the batch.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare, kstest

from vllm_dspark.integration import uniforms

PURPOSES = [uniforms.DRAFT, uniforms.ACCEPT, uniforms.SAMPLE]
N = 40_000


def by_position(purpose: int) -> np.ndarray:
    return uniforms.seeded(np.int64(7), np.arange(N), purpose)


def by_seed(purpose: int) -> np.ndarray:
    return uniforms.seeded(np.arange(N), np.int64(12), purpose)


@pytest.mark.parametrize("purpose", PURPOSES)
@pytest.mark.parametrize("axis", [by_position, by_seed])
def test_equidistributed(axis: object, purpose: int) -> None:
    numbers = axis(purpose)
    assert numbers.dtype == np.float64
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    assert kstest(numbers, "uniform").pvalue > 1e-3
    low_bits = (numbers * 2.0**53).astype(np.int64) % 256
    assert chisquare(np.bincount(low_bits, minlength=256)).pvalue > 1e-3


@pytest.mark.parametrize("axis", [by_position, by_seed])
def test_purposes_and_neighbours_are_independent(axis: object) -> None:
    """Pairs fill the square evenly, whichever two streams they are from."""
    assert len(set(PURPOSES)) == 3
    streams = {f"purpose {p}": axis(p) for p in PURPOSES}
    streams["next"] = np.roll(streams["purpose 1"], 1)
    streams["fourth"] = np.roll(streams["purpose 1"], 4)
    names = list(streams)
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            cells, _, _ = np.histogram2d(
                streams[a], streams[b], bins=16, range=[[0, 1], [0, 1]]
            )
            assert chisquare(cells.ravel()).pvalue > 1e-4, (a, b)


def test_no_number_comes_twice() -> None:
    seeds, positions = np.arange(60)[:, None], np.arange(300)
    grids = [uniforms.seeded(seeds, positions, p).ravel() for p in PURPOSES]
    numbers = np.concatenate(grids)
    assert len(np.unique(numbers)) == len(numbers)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63)])
def test_every_seed_is_a_seed(seed: int) -> None:
    numbers = uniforms.seeded(np.int64(seed), np.arange(N), uniforms.SAMPLE)
    assert kstest(numbers, "uniform").pvalue > 1e-3


def test_fill_depends_on_seed_and_position_only() -> None:
    """Rows of one request are the same wherever it stands in the batch; requests
    without a seed keep what they had."""
    alone = np.full(3, -1.0)
    uniforms.fill(alone, [5], np.zeros(3, int), np.arange(10, 13), uniforms.ACCEPT)
    batch = np.full(6, -1.0)
    rows = np.array([0, 0, 1, 2, 2, 2])
    positions = np.array([3, 4, 9, 10, 11, 12])
    uniforms.fill(batch, [None, 0, 5], rows, positions, uniforms.ACCEPT)
    assert batch[3:].tolist() == alone.tolist()
    assert batch[:2].tolist() == [-1.0, -1.0]
    zero = uniforms.seeded(np.int64(0), np.int64(9), uniforms.ACCEPT)
    assert batch[2] == zero  # seed 0 is a seed, not "no seed"


def test_unseeded_numbers_come_from_torch() -> None:
    import torch

    torch.manual_seed(3)
    first = uniforms.unseeded(N)
    torch.manual_seed(3)
    assert first.tolist() == uniforms.unseeded(N).tolist()
    assert kstest(first, "uniform").pvalue > 1e-3

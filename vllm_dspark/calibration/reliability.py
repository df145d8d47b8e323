"""Expected calibration error, AUROC and Brier score, defined once.

ECE here: ``BINS`` bins of equal width over [0, 1]; the mean over all rounds of the
distance between a bin's mean prediction and its share of hits. On finite samples it is
biased upwards: `ece_floor` is what perfectly calibrated predictions would show with
the same bins and counts, and belongs beside every small figure.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.rounds import Floats, Ints, Rounds, survival

BINS = 10
_RESAMPLES = 400


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: one entry per bin.

    Shape: predicted, observed ``[BINS]`` (NaN in empty bins), count ``[BINS]``.
    """

    predicted: Floats
    observed: Floats
    count: NDArray[np.int64]


def bin_of(predicted: Floats) -> NDArray[np.int64]:
    """The bin of each prediction in [0, 1]; 1 belongs to the last one."""
    return np.minimum((predicted * BINS).astype(np.int64), BINS - 1)


def reliability(predicted: Floats, hit: NDArray[np.bool_]) -> Reliability:
    """Bin predictions ``[N]`` and compare them with what happened ``[N]``."""
    which = bin_of(predicted)
    count = np.bincount(which, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(which, weights=predicted, minlength=BINS) / count
        observed = np.bincount(which, weights=hit, minlength=BINS) / count
    return Reliability(mean, observed, count)


def ece(predicted: Floats, hit: NDArray[np.bool_]) -> float:
    """Expected calibration error of ``[N]`` predictions; NaN when there are none."""
    if len(predicted) == 0:
        return math.nan
    excess = np.bincount(bin_of(predicted), weights=hit - predicted, minlength=BINS)
    return float(np.abs(excess).sum() / len(predicted))


def ece_floor(predicted: Floats) -> float:
    """The ECE to expect of these predictions if they were perfectly calibrated.

    A bin's excess of hits is then nearly normal with mean 0 and variance Σ p(1−p),
    so its mean distance from 0 is √(2/π) standard deviations.
    """
    if len(predicted) == 0:
        return math.nan
    spread = predicted * (1 - predicted)
    variance = np.bincount(bin_of(predicted), weights=spread, minlength=BINS)
    return float(np.sqrt(2 / math.pi * variance).sum() / len(predicted))


def brier(predicted: Floats, hit: NDArray[np.bool_]) -> float:
    """Mean squared distance of prediction and outcome; NaN when there are none."""
    if len(predicted) == 0:
        return math.nan
    return float(np.mean((predicted - hit) ** 2))


def auroc(predicted: Floats, hit: NDArray[np.bool_]) -> float:
    """Probability that a hit has the higher prediction (ties count half).

    NaN unless there are both hits and misses.
    """
    hits = int(hit.sum())
    misses = len(hit) - hits
    if hits == 0 or misses == 0:
        return math.nan
    _, which, count = np.unique(predicted, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    ranks = (last - (count - 1) / 2)[which]
    return float((ranks[hit].sum() - hits * (hits + 1) / 2) / (hits * misses))


def survival_pairs(
    rounds: Rounds, confidence: Floats, k: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Predictions a_k and whether draft k (from 1) was accepted.

    Over all rounds that verified k drafts. ``confidence`` [N, K] may be calibrated.
    """
    rows = np.isfinite(confidence[:, :k]).all(axis=1) & (rounds.num_drafts >= k)
    return survival(confidence[rows, :k])[:, -1], rounds.accepted[rows] >= k


def conditional_pairs(
    rounds: Rounds, confidence: Floats, k: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Predictions c_k and outcomes, of rounds whose first k−1 drafts were accepted."""
    rows = np.isfinite(confidence[:, k - 1]) & (rounds.num_drafts >= k)
    rows &= rounds.accepted >= k - 1
    return confidence[rows, k - 1], rounds.accepted[rows] >= k


def conditionals(survivals: Floats) -> Floats:
    """Confidences c_k [N, K] of survivals a_k: the ratios of neighbours."""
    before = np.concatenate([np.ones((len(survivals), 1)), survivals[:, :-1]], axis=1)
    ratios: Floats = np.divide(
        survivals, before, out=np.zeros_like(survivals), where=~(before == 0)
    )
    return ratios


def resamples(prompts: int, seed: int) -> Ints:
    """``[400, prompts]`` how often each prompt is in a set drawn anew of as many."""
    random = np.random.default_rng(seed)
    return random.multinomial(prompts, [1 / prompts] * prompts, _RESAMPLES)

"""What a calibration's report says in figures: where confidences are off, and by how
much better ones could speed decoding up. Percentages are of survivals a_k, by position.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.fitting import FOLDS, Fit, fit
from vllm_dspark.calibration.reliability import conditionals
from vllm_dspark.calibration.rounds import Floats, Rounds, survival
from vllm_dspark.calibration.summary import summarise

# First generated positions of the groups of depth.
DEPTHS = (0, 16, 32, 64, 128, 256, 512)


def bias(rounds: Rounds, survivals: Floats) -> list[float]:
    """Mean prediction minus share accepted, by position; NaN without rounds.

    Positive is overconfident. Shape: survivals [N, K].
    """
    values = []
    for k in range(rounds.width):
        rows = np.isfinite(survivals[:, k]) & (rounds.num_drafts > k)
        hit = rounds.accepted[rows] > k
        values.append(
            float(np.mean(survivals[rows, k] - hit)) if rows.any() else math.nan
        )
    return values


def groups(rounds: Rounds) -> dict[str, NDArray[np.bool_]]:
    """Masks [N] of the groups that are compared: datasets, then depths."""
    found = {name: rounds.dataset == name for name in rounds.datasets()}
    for low, high in zip(DEPTHS, (*DEPTHS[1:], None), strict=True):
        mask = rounds.depth >= low
        if high is not None:
            mask &= rounds.depth < high
        if mask.any():
            name = f"tokens {low} to {high - 1}" if high else f"tokens from {low}"
            found[name] = mask
    return found


def drift(rounds: Rounds, everything: Fit, allow_bias: bool) -> dict[str, list[float]]:
    """ECE (mean over positions) on each dataset of scalings fitted on another.

    Returns:
        ``raw``, then one row per dataset that was fitted on, then ``all`` (fitted on
        all datasets, cross-validated); columns are `Rounds.datasets`. A dataset's
        figure on itself is cross-validated too. A dataset with too few prompts to
        fit has a row of NaN.
    """
    names = rounds.datasets()
    parts = {name: rounds.of(name) for name in names}
    table = {"raw": [_mean_ece(parts[n], parts[n].confidence) for n in names]}
    for name in names:
        if len(np.unique(parts[name].prompt)) < 2 * FOLDS:
            table[name] = [math.nan] * len(names)
            continue
        own = fit(parts[name], allow_bias)
        table[name] = [
            float(np.nanmean(own.ece_after))
            if other == name
            else _mean_ece(
                parts[other],
                own.scaling.apply(parts[other].confidence, parts[other].certainty),
            )
            for other in names
        ]
    held = conditionals(everything.held_out)
    table["all"] = [_mean_ece(parts[n], held[rounds.dataset == n]) for n in names]
    return table


def _mean_ece(rounds: Rounds, confidence: Floats) -> float:
    return float(np.nanmean(summarise(rounds, confidence).ece_calibrated))


def raw_survival(rounds: Rounds) -> Floats:
    """[N, K] survivals of the confidences as they are."""
    return survival(rounds.confidence)

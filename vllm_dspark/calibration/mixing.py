"""Confidence and certainty together: better than either alone (ours, not the paper's).

The confidence head is one linear unit and cannot see how sure the drafter is of its
token; the certainty z_k, the log-odds of the likeliest draft token, says just that.
Like the confidence it is known before x_k is drawn, so deciding by it stays lossless.
Per position, c' = σ(w·logit(c) + u·z + b), by logistic regression over the rounds that
got that far.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.reliability import resamples
from vllm_dspark.calibration.rounds import Floats, Rounds
from vllm_dspark.calibration.scaling import Mixing, logit, sigmoid

# Weight of the start (the confidence as it is) against outcomes, in outcomes.
_PRIOR = 4.0
_NEWTON_STEPS = 25


def fit_mixing(rounds: Rounds, rows: NDArray[np.bool_] | None = None) -> Mixing:
    """Weights of every position.

    Args:
        rounds: with certainties.
        rows: ``[N]`` those to fit on; None: all.
    """
    assert rounds.certainty is not None
    found = np.zeros((rounds.width, 3))
    x = logit(rounds.confidence)
    for k in range(rounds.width):
        chosen = _reached(rounds, k)
        if rows is not None:
            chosen &= rows
        hit = rounds.accepted[chosen] > k
        found[k] = _regression(x[chosen, k], rounds.certainty[chosen, k], hit)
    weight, certainty, bias = found.T.tolist()
    return Mixing(tuple(weight), tuple(certainty), tuple(bias))


def cross_fitted(rounds: Rounds, fold: NDArray[np.int64]) -> Rounds:
    """Rounds whose confidences are mixed by weights that have not seen their fold.

    Confidences without a certainty stay as they are.
    """
    assert rounds.certainty is not None
    mixed = rounds.confidence.copy()
    for number in np.unique(fold):
        inside = fold == number
        of_others, plain = fit_mixing(rounds, ~inside), rounds.confidence[inside]
        mixed[inside] = of_others.apply(plain, rounds.certainty[inside], plain)
    return replace(rounds, confidence=mixed, certainty=None)


def surely_better(rounds: Rounds, mixed: Floats, plain: Floats, sure: float) -> bool:
    """Whether mixed confidences ``[N, K]`` tell outcomes better than plain ones.

    By the log loss over all positions that rounds got to, also had the prompts been
    others: in a share ``sure`` of resampled sets of them.
    """
    gain = np.zeros(len(rounds))
    for k in range(rounds.width):
        rows = _reached(rounds, k)
        hit = rounds.accepted[rows] > k
        losses = [_log_loss(values[rows, k], hit) for values in (mixed, plain)]
        gain[rows] += losses[1] - losses[0]
    _, prompt = np.unique(rounds.prompt, return_inverse=True)
    of_prompt = np.bincount(prompt, weights=gain)
    weights = resamples(len(of_prompt), seed=0)
    return bool(np.mean(weights @ of_prompt > 0) >= sure)


def _reached(rounds: Rounds, k: int) -> NDArray[np.bool_]:
    """``[N]`` rounds that verified draft k (from 0) after accepting all before it."""
    assert rounds.certainty is not None
    known = np.isfinite(rounds.confidence[:, k]) & np.isfinite(rounds.certainty[:, k])
    reached: NDArray[np.bool_] = (
        known & (rounds.num_drafts > k) & (rounds.accepted >= k)
    )
    return reached


def _log_loss(p: Floats, hit: NDArray[np.bool_]) -> Floats:
    x = logit(p)
    loss: Floats = np.logaddexp(0.0, np.where(hit, -x, x))
    return loss


def _regression(x: Floats, z: Floats, hit: NDArray[np.bool_]) -> Floats:
    """``[w, u, b]`` by Newton's method, drawn towards [1, 0, 0]."""
    features = np.stack([x, z, np.ones_like(x)], axis=1)
    start = np.array([1.0, 0.0, 0.0])
    found = start.copy()
    for _ in range(_NEWTON_STEPS):
        p = sigmoid(np.clip(features @ found, -30.0, 30.0))
        slope = features.T @ (p - hit) + _PRIOR * (found - start)
        curve = (features * (p * (1 - p))[:, None]).T @ features + _PRIOR * np.eye(3)
        step = np.linalg.solve(curve, slope)
        size = float(np.abs(step).max())
        # Far from the optimum the quadratic does not hold: no longer steps than 1.
        found = found - step / max(1.0, size)
        if size < 1e-9:
            break
    return found

"""What verifying fewer drafts would have done, from rounds of full length.

Draft k is verified only while the survival a_k is at least a threshold (the paper's
Figure 5). Which rounds a text consists of would change with the threshold; the figures
are expectations over the rounds that were recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dspark.calibration.rounds import Floats, Ints, Rounds, survival

THRESHOLDS = tuple(round(0.05 * i, 2) for i in range(20))


@dataclass(frozen=True)
class Verified:
    """Verification cut by a rule.

    Args:
        threshold: the survival asked for.
        tau: tokens per round.
        acceptance: share of verified drafts that are accepted; NaN for none.
        verified: drafts verified per round.
    """

    threshold: float
    tau: float
    acceptance: float
    verified: float


def verify_lengths(rounds: Rounds, confidence: Floats, threshold: float) -> Ints:
    """ℓ per round ``[N]``: the drafts before the survival falls below ``threshold``.

    A round without confidences keeps all its drafts at threshold 0 and none above.
    """
    if threshold <= 0:
        return rounds.num_drafts
    # NaN compares false; the survival never rises, so this counts a prefix.
    counts: Ints = (survival(confidence) >= threshold).sum(axis=1)
    return np.minimum(counts, rounds.num_drafts)


def cut(rounds: Rounds, lengths: Ints, threshold: float) -> Verified:
    """Figures when only ``lengths`` [N] drafts are verified."""
    accepted = np.minimum(rounds.accepted, lengths)
    total = int(lengths.sum())
    return Verified(
        threshold=threshold,
        tau=float(np.mean(accepted + 1)),
        acceptance=float(accepted.sum() / total) if total else float("nan"),
        verified=total / len(rounds),
    )


def sweep(rounds: Rounds, confidence: Floats) -> list[Verified]:
    """`cut` at every threshold of `THRESHOLDS`, 0 (verify everything) first."""
    return [cut(rounds, verify_lengths(rounds, confidence, t), t) for t in THRESHOLDS]

"""Figures of a set of rounds: τ, acceptance, and how good the confidences are.

Lists go by position, k = 1..K. A figure that cannot be had (no such round, no
confidence head, no calibration) is NaN; JSON has null there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.reliability import (
    auroc,
    brier,
    conditional_pairs,
    ece,
    ece_floor,
    survival_pairs,
)
from vllm_dspark.calibration.rounds import Floats, Rounds

Pairs = Callable[[Rounds, Floats, int], tuple[Floats, NDArray[np.bool_]]]


@dataclass(frozen=True)
class Summary:
    """Figures of one set of rounds, or the mean of several sets.

    Args:
        tau: tokens per round, the bonus token included.
        acceptance_conditional: P(draft k accepted | k−1 accepted).
        acceptance_cumulative: P(drafts 1..k accepted).
        ece_raw: of the survival a_k = ∏ c_i against "draft k was accepted", over all
            rounds that verified k drafts.
        ece_calibrated: the same with calibrated confidences.
        auc: AUROC of c_k, over rounds whose first k−1 drafts were accepted.
        rounds: how many.
        ece_floor: ECE that perfect confidences would show on as many rounds.
        ece_conditional: of c_k alone, over the rounds of ``auc``.
        auc_survival: AUROC of a_k, over the rounds of ``ece_raw``.
        brier_raw: Brier score of a_k.
        brier_calibrated: the same with calibrated confidences.
        auc_calibrated: as ``auc``, of calibrated confidences.
    """

    tau: float
    acceptance_conditional: tuple[float, ...]
    acceptance_cumulative: tuple[float, ...]
    ece_raw: tuple[float, ...]
    ece_calibrated: tuple[float, ...]
    auc: tuple[float, ...]
    rounds: int
    ece_floor: tuple[float, ...] = ()
    ece_conditional: tuple[float, ...] = ()
    auc_survival: tuple[float, ...] = ()
    brier_raw: tuple[float, ...] = ()
    brier_calibrated: tuple[float, ...] = ()
    auc_calibrated: tuple[float, ...] = ()


# What ``vllm-dspark evaluate --json`` has for each dataset.
KEYS = (*[field.name for field in fields(Summary)][:7], "auc_calibrated")


def summarise(rounds: Rounds, calibrated: Floats | None = None) -> Summary:
    """Figures of rounds.

    Args:
        rounds: at least one.
        calibrated: [N, K] calibrated confidences, if there is a calibration.

    Raises:
        ValueError: there are no rounds.
    """
    if not len(rounds):
        raise ValueError("no decoding round to summarise; ask for more new tokens")
    positions = range(1, rounds.width + 1)
    raw = rounds.confidence
    after = np.full_like(raw, np.nan) if calibrated is None else calibrated
    floor = [ece_floor(survival_pairs(rounds, raw, k)[0]) for k in positions]

    def by_position(
        figure: Callable[[Floats, NDArray[np.bool_]], float],
        pairs: Pairs,
        confidence: Floats,
    ) -> tuple[float, ...]:
        return tuple(figure(*pairs(rounds, confidence, k)) for k in positions)

    return Summary(
        tau=float(np.mean(rounds.accepted + 1)),
        acceptance_conditional=tuple(_acceptance(rounds, k, k - 1) for k in positions),
        acceptance_cumulative=tuple(_acceptance(rounds, k, 0) for k in positions),
        ece_raw=by_position(ece, survival_pairs, raw),
        ece_calibrated=by_position(ece, survival_pairs, after),
        auc=by_position(auroc, conditional_pairs, raw),
        rounds=len(rounds),
        ece_floor=tuple(floor),
        ece_conditional=by_position(ece, conditional_pairs, raw),
        auc_survival=by_position(auroc, survival_pairs, raw),
        brier_raw=by_position(brier, survival_pairs, raw),
        brier_calibrated=by_position(brier, survival_pairs, after),
        auc_calibrated=by_position(auroc, conditional_pairs, after),
    )


def _acceptance(rounds: Rounds, k: int, given: int) -> float:
    """Share of rounds that accepted k drafts, of those that accepted ``given``."""
    rows = (rounds.num_drafts >= k) & (rounds.accepted >= given)
    return float(np.mean(rounds.accepted[rows] >= k)) if rows.any() else math.nan


def macro(parts: Sequence[Summary]) -> Summary:
    """Mean over datasets, each counting the same; ``rounds`` are summed.

    Positions where a dataset has no figure take the mean of the others.
    """
    values: dict[str, object] = {}
    for field in fields(Summary):
        columns = [getattr(part, field.name) for part in parts]
        if field.name == "rounds":
            values[field.name] = sum(columns)
        elif field.name == "tau":
            values[field.name] = float(np.mean(columns))
        else:
            values[field.name] = tuple(map(_mean, zip(*columns, strict=True)))
    return Summary(**values)  # type: ignore[arg-type]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan

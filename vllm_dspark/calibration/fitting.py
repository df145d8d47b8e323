"""Sequential temperature scaling (paper, 3.2.1), cross-validated.

Positions are fitted left to right: maps of the earlier ones fixed, map k makes the
*survival* ∏ c'_i agree with "draft k was accepted". Each position gets the simplest map
that held-out prompts ask for. Folds are made of prompts: rounds of one text resemble
each other.

Where the rounds have certainties, all of it is done a second time with confidences that
are mixed with them (`mixing`), for engines that have both; kept if held-out prompts are
surely told better by them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.mixing import cross_fitted, fit_mixing, surely_better
from vllm_dspark.calibration.reliability import (
    BINS,
    auroc,
    bin_of,
    conditional_pairs,
    conditionals,
    ece,
    ece_floor,
    resamples,
)
from vllm_dspark.calibration.rounds import Floats, Rounds, survival
from vllm_dspark.calibration.scaling import (
    KINDS,
    Mixing,
    Scaling,
    fit_position,
    scale,
)

FOLDS = 5
_SURE = 0.9  # share of resampled sets of prompts in which a map must be better


@dataclass(frozen=True)
class Fit:
    """A scaling and how it did on prompts it was not fitted on.

    Tuples go by position. ECE and AUROC as in `reliability`, cross-validated.

    Args:
        scaling: fitted on everything.
        kinds: which map each position got (`KINDS`) for confidences alone.
        ece_before: of the raw survival.
        ece_after: of the survival calibrated by folds that had not seen the prompt,
            with certainties if the scaling mixes them in.
        ece_floor: what perfect confidences would show on as many rounds.
        fit_size: rounds that verified k drafts.
        note: for people, when nothing was scaled; else empty.
        held_out: [N, K] the survivals behind ``ece_after``.
        auc_before, auc_after: of c_k, over rounds whose drafts before k were accepted.
        ece_alone: as ``ece_after``, without certainties.
    """

    scaling: Scaling
    kinds: tuple[str, ...]
    ece_before: tuple[float, ...]
    ece_after: tuple[float, ...]
    ece_floor: tuple[float, ...]
    fit_size: tuple[int, ...]
    note: str
    held_out: Floats
    auc_before: tuple[float, ...]
    auc_after: tuple[float, ...]
    ece_alone: tuple[float, ...]


def fit(rounds: Rounds, allow_bias: bool = True, folds: int = FOLDS) -> Fit:
    """Fit left to right, choosing each position's kind by cross-validation.

    Args:
        rounds: with confidences.
        allow_bias: whether a position may get a bias besides its temperature.
        folds: parts the prompts are divided into.

    Raises:
        ValueError: no confidences, or fewer prompts than folds.
    """
    fold = assign_folds(rounds, folds)
    alone = _fit(rounds, fold, folds, allow_bias)
    if rounds.certainty is None:
        return alone
    # The weights of a row's mixing, and its maps, come from other folds.
    mixed = _fit(cross_fitted(rounds, fold), fold, folds, allow_bias)
    better, worse = (conditionals(f.held_out) for f in (mixed, alone))
    if not surely_better(rounds, better, worse, _SURE):
        return alone
    return replace(
        alone,
        scaling=replace(
            alone.scaling, mixing=_scaled(fit_mixing(rounds), mixed.scaling)
        ),
        ece_after=mixed.ece_after,
        held_out=mixed.held_out,
        auc_after=mixed.auc_after,
    )


def _scaled(mixing: Mixing, scaling: Scaling) -> Mixing:
    """The mixing with a scaling's maps after it, as one."""
    slope = 1.0 / np.array(scaling.temperature)
    rows = (
        np.array(mixing.weight) * slope,
        np.array(mixing.certainty) * slope,
        np.array(mixing.bias) * slope + np.array(scaling.bias),
    )
    return Mixing(*(tuple(row.tolist()) for row in rows))


def _fit(rounds: Rounds, fold: NDArray[np.int64], folds: int, allow_bias: bool) -> Fit:
    """Of the rounds' confidences alone."""
    kinds = KINDS if allow_bias else KINDS[:2]
    validation = _CrossValidation(rounds, fold, folds)
    width = rounds.width
    chosen = [validation.choose(k, kinds) for k in range(width)]
    raw = survival(rounds.confidence)
    before = tuple(validation.error(raw, k) for k in range(width))
    after = tuple(validation.error(validation.held, k) for k in range(width))
    floors = [ece_floor(raw[validation.rows(k), k]) for k in range(width)]
    sizes = tuple(int(validation.rows(k).sum()) for k in range(width))
    note = "" if any(kind != KINDS[0] for kind in chosen) else _NO_GAIN
    held = validation.held
    if any(validation.worse(raw, k) for k in range(width)):
        chosen, after, note = [KINDS[0]] * width, before, _WORSE
        held = raw
    scaling, kinds = _fit_all(rounds, chosen), tuple(chosen)
    return Fit(
        scaling,
        kinds,
        before,
        after,
        tuple(floors),
        sizes,
        note,
        held,
        auc_before=_auc(rounds, rounds.confidence),
        auc_after=_auc(rounds, conditionals(held)),
        ece_alone=after,
    )


def _auc(rounds: Rounds, confidence: Floats) -> tuple[float, ...]:
    pairs = (conditional_pairs(rounds, confidence, k + 1) for k in range(rounds.width))
    return tuple(auroc(*pair) for pair in pairs)


_NO_GAIN = "no temperature helps held-out prompts: temperature 1 at every position"
_WORSE = "scaling makes held-out prompts worse: temperature 1 at every position"


def assign_folds(rounds: Rounds, folds: int) -> NDArray[np.int64]:
    """Fold of each round ``[N]``: by prompt, every dataset spread over all folds.

    Raises:
        ValueError: no confidences, or fewer prompts than folds.
    """
    if not rounds.has_confidence:
        raise ValueError(
            "the rounds have no confidences: this drafter has no confidence head, so "
            "there is nothing to calibrate"
        )
    owners = dict(zip(rounds.prompt.tolist(), rounds.dataset.tolist(), strict=True))
    if len(owners) < folds:
        raise ValueError(
            f"{len(owners)} prompts are too few to calibrate: cross-validation "
            f"divides them into {folds} parts; give more"
        )
    shuffled = np.random.default_rng(0).permutation(sorted(owners))
    order = sorted(shuffled.tolist(), key=lambda prompt: owners[prompt])
    of_prompt = {prompt: i % folds for i, prompt in enumerate(order)}
    return np.array([of_prompt[p] for p in rounds.prompt.tolist()], dtype=np.int64)


class _CrossValidation:
    """Survivals under maps fitted without a fold, position by position."""

    def __init__(self, rounds: Rounds, fold: NDArray[np.int64], folds: int) -> None:
        self._rounds = rounds
        self._fold = fold
        # Survival before position k under each fold's maps, for all rounds.
        self._before = [np.ones(len(rounds)) for _ in range(folds)]
        # Survival of each round under the maps that have not seen its prompt.
        self.held = np.full(rounds.confidence.shape, np.nan)
        _, self._prompt = np.unique(rounds.prompt, return_inverse=True)

    def rows(self, k: int) -> NDArray[np.bool_]:
        """[N] rounds that verified draft k+1 with a confidence."""
        finite: NDArray[np.bool_] = np.isfinite(self._rounds.confidence[:, k])
        return finite & (self._rounds.num_drafts > k)

    def error(self, predicted: Floats, k: int) -> float:
        """ECE of survivals [N, K] at position k (from 0)."""
        rows = self.rows(k)
        return ece(predicted[rows, k], self._rounds.accepted[rows] > k)

    def choose(self, k: int, kinds: tuple[str, ...]) -> str:
        """Settle position k (from 0): the simplest kind that no later one beats."""
        found = {kind: self._candidate(k, kind) for kind in kinds}
        best = kinds[0]
        for kind in kinds[1:]:
            if self._surely_better(found[kind][1], found[best][1], k):
                best = kind
        self._before, self.held[:, k] = found[best]
        return best

    def _candidate(self, k: int, kind: str) -> tuple[list[Floats], Floats]:
        """Every fold's survivals after position k, and the held-out ones of them."""
        rows, hit = self.rows(k), self._rounds.accepted > k
        column = self._rounds.confidence[:, k]
        after, held = [], np.full(len(column), np.nan)
        for number, before in enumerate(self._before):
            inside = rows & (self._fold != number)
            found = fit_position(before[inside], column[inside], hit[inside], kind)
            value = before * scale(column, *found)
            held = np.where(self._fold == number, value, held)
            after.append(value)
        return after, held

    def worse(self, raw: Floats, k: int) -> bool:
        """Whether calibration has surely made position k worse than ``raw``."""
        if np.array_equal(raw[:, k], self.held[:, k], equal_nan=True):
            return False
        return self._surely_better(raw[:, k], self.held[:, k], k)

    def _surely_better(self, one: Floats, other: Floats, k: int) -> bool:
        """Whether ``one`` [N] has the lower ECE, also had the prompts been others.

        The ECE of few rounds is mostly noise, which a map can happen to undo; the
        Brier score, which is not biased by it, has to agree.
        """
        rows = self.rows(k)
        if not rows.any():
            return False
        hit, owner = self._rounds.accepted[rows] > k, self._prompt[rows]
        prompts = int(self._prompt.max()) + 1
        pair = one[rows], other[rows]
        excess = [_excess(p, hit, owner, prompts) for p in pair]
        total = [np.abs(e.sum(axis=0)).sum() for e in excess]
        squares = (pair[0] - hit) ** 2 - (pair[1] - hit) ** 2
        loss = np.bincount(owner, weights=squares, minlength=prompts)
        if total[0] >= total[1] or loss.sum() >= 0:
            return False
        weights = resamples(prompts, seed=k)
        errors = [np.abs(weights @ e).sum(axis=1) for e in excess]
        sure = np.mean(errors[0] < errors[1]), np.mean(weights @ loss < 0)
        return bool(min(sure) >= _SURE)


def _excess(
    predicted: Floats, hit: NDArray[np.bool_], owner: NDArray[np.int64], prompts: int
) -> Floats:
    """Hits minus predictions summed by prompt and bin ``[prompts, BINS]``."""
    cell = owner * BINS + bin_of(predicted)
    excess = np.bincount(cell, weights=hit - predicted, minlength=prompts * BINS)
    return excess.reshape(prompts, BINS).astype(np.float64)


def _fit_all(rounds: Rounds, kinds: list[str]) -> Scaling:
    """Maps of the given kinds, fitted left to right on all rounds."""
    before = np.ones(len(rounds))
    temperatures, biases = [], []
    for k, kind in enumerate(kinds):
        column = rounds.confidence[:, k]
        rows = np.isfinite(column) & (rounds.num_drafts > k)
        hit = rounds.accepted > k
        found = fit_position(before[rows], column[rows], hit[rows], kind)
        before = before * scale(column, *found)
        temperatures.append(found[0])
        biases.append(found[1])
    return Scaling(tuple(temperatures), tuple(biases))

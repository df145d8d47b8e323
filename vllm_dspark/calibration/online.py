"""Survival for the planner, from confidences and from outcomes as they come in.

Confidences go through the calibration file's maps (paper, 3.2.1; as they are without a
file) and then through a map that follows outcomes (`drift`). Where there is no usable
confidence, an estimate from outcomes alone takes its place: a rate per position and an
offset per request. Both learn all the time.

Outcomes are censored: draft k's is known only if all before it were accepted and k was
verified, and nothing else is learned from. The first map is conditioned on the
confidence that decided what was verified, so trimming does not bias it. The second is
not; it takes the calibrated confidence for what was drafted and not verified, or else
it would know promising drafts only.

Lossless (see `schedule/planner`): what is said about draft k depends on c_1..c_k and
on outcomes of earlier rounds, on nothing that the draft x_k decides.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.drift import (
    CONFIDENCE,
    HISTORY,
    DriftingMaps,
    DriftOptions,
    Offsets,
    evidence,
)
from vllm_dspark.calibration.file import Calibration
from vllm_dspark.calibration.rounds import Floats, Ints, survival
from vllm_dspark.calibration.scaling import sigmoid
from vllm_dspark.calibration.start import MAX_LOGIT, StartingMaps
from vllm_dspark.calibration.window import CalibrationWindow


@dataclass(frozen=True)
class OnlineOptions:
    """Settings of `OnlineSurvival`.

    Args:
        prior: conditional acceptance rate before any outcome, at every position.
        drift: speeds and weights of both maps.
        window_steps: steps that the metrics' calibration error covers.
    """

    prior: float = 0.7
    drift: DriftOptions = field(default_factory=DriftOptions)
    window_steps: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ValueError(f"prior {self.prior}: give a rate between 0 and 1")


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the scheduler goes by in a step, kept until its outcomes are known.

    Args:
        ids: the R requests.
        survival: ``[R, k]`` a_1..a_k, falling along a row.
        conditional: ``[R, k]`` calibrated c_1..c_k, whose product that is.
        logit: ``[R, k]`` of the confidences through the file's maps.
        usable: ``[R, k]`` bool, False where there was no usable confidence.
        rows: ``[R]`` where the requests were kept,
        epoch: until one was forgotten.
    """

    ids: tuple[Hashable, ...]
    survival: Floats
    conditional: Floats
    logit: Floats
    usable: NDArray[np.bool_]
    rows: Ints
    epoch: int


@dataclass(frozen=True, slots=True)
class SurvivalMaps:
    """What `OnlineSurvival.apply` does to usable confidences, to be done elsewhere.

    With x the logit of c_k within ±``limit``: y = x·first + second, within ±``limit``;
    the calibrated c_k is σ(y·slope + bias).

    Shape: first, second, bias ``[R, K]``; slope ``[K]``; all float32.
    """

    first: NDArray[np.float32]
    second: NDArray[np.float32]
    slope: NDArray[np.float32]
    bias: NDArray[np.float32]
    limit: float


class OnlineSurvival:
    """Calibrated survival of a batch's drafts, following drift; one per engine.

    Args:
        width: γ, the most drafts of a round.
        calibration: where the maps start; None to start from raw confidences.
        options: speeds and priors.

    Raises:
        ValueError: the calibration covers fewer positions than ``width``.
    """

    def __init__(
        self,
        width: int,
        calibration: Calibration | None = None,
        options: OnlineOptions | None = None,
    ) -> None:
        self.width = width
        self.options = options or OnlineOptions()
        drift, prior = self.options.drift, self.options.prior
        self.window = CalibrationWindow(width, self.options.window_steps)
        self._start_maps = StartingMaps(width, calibration)
        self._maps = DriftingMaps(width, drift)
        self._offsets = Offsets(2, drift)
        self._prior_logit = float(np.log(prior / (1 - prior)))
        self._rows: dict[Hashable, int] = {}
        self._free: list[int] = []
        self._epoch = 0  # counts requests forgotten
        # By row, the file's setting; row 0 stands for requests that are gone.
        self._setting = np.zeros(1, dtype=np.int64)

    def __len__(self) -> int:
        """Requests known at present."""
        return len(self._rows)

    def apply(
        self,
        ids: Sequence[Hashable],
        temperatures: Sequence[float],
        confidence: NDArray[np.floating[Any]] | None,
        certainty: NDArray[np.floating[Any]] | None = None,
    ) -> Prediction:
        """Survival of the drafts of a batch; new requests are taken up.

        From the first bad value of a row on (NaN, infinite, outside [0, 1]), and
        everywhere without confidences, history takes the confidence's place.

        Args:
            ids: the R requests, each once.
            temperatures: ``[R]`` of their sampling, read when a request is new.
            confidence: ``[R, k]`` raw c_1..c_k, k ≤ γ, NaN past a row's last draft;
                None without a confidence head, for all γ positions.
            certainty: ``[R, k]`` z_1..z_k, of which the file's maps may make use; not
                finite where there is none. Another shape than the confidences' is no
                certainty.

        Raises:
            ValueError: other numbers of rows, or too many positions.
        """
        rows = self._find(ids, temperatures)
        if confidence is None:
            p = self._from_history(rows, self.width)
            nothing = np.zeros(p.shape, dtype=np.bool_)
            return self._prediction(ids, p, np.zeros(p.shape), nothing, rows)
        if confidence.shape[0] != len(ids) or confidence.shape[1] > self.width:
            raise ValueError(
                f"confidences of shape {confidence.shape} for {len(ids)} requests and "
                f"at most {self.width} drafts: give [{len(ids)}, 1..{self.width}]"
            )
        usable = (confidence >= 0) & (confidence <= 1)  # False for NaN
        whole = bool(usable.all())
        if not whole:
            usable = np.logical_and.accumulate(usable, axis=1)
            confidence = np.where(usable, confidence, 0.5)
        if certainty is not None and certainty.shape != confidence.shape:
            certainty = None
        x = self._start_maps.logits(confidence, self._setting[rows], certainty)
        p = sigmoid(self._maps.logits(x) + self._offsets.of(CONFIDENCE, rows))
        if not whole:
            p = np.where(usable, p, self._from_history(rows, p.shape[1]))
        return self._prediction(ids, p, x, usable, rows)

    def maps(
        self, ids: Sequence[Hashable], temperatures: Sequence[float]
    ) -> SurvivalMaps:
        """The maps of a batch as they stand now; arguments as of `apply`."""
        rows = self._find(ids, temperatures)
        first, second = self._start_maps.coefficients(self._setting[rows])
        slope, bias = self._maps.coefficients()
        own = bias + self._offsets.of(CONFIDENCE, rows)
        return SurvivalMaps(
            first.astype(np.float32),
            second.astype(np.float32),
            slope.astype(np.float32),
            own.astype(np.float32),
            MAX_LOGIT,
        )

    def _prediction(
        self,
        ids: Sequence[Hashable],
        p: Floats,
        logit: Floats,
        usable: NDArray[np.bool_],
        rows: Ints,
    ) -> Prediction:
        epoch = self._epoch
        return Prediction(tuple(ids), survival(p), p, logit, usable, rows, epoch)

    def history(self, ids: Sequence[Hashable], temperatures: Sequence[float]) -> Floats:
        """Survivals ``[R, γ]`` to expect of drafts not made yet, from history alone.

        What draft lengths are chosen by. Arguments as of `apply`.
        """
        return survival(self._from_history(self._find(ids, temperatures), self.width))

    def update(self, made: Prediction, num_drafts: Ints, accepted: Ints) -> None:
        """Learn from the outcomes of a step.

        Requests forgotten since still count for the batch.

        Args:
            made: what `apply` gave for the step's drafts.
            num_drafts: ``[R]`` drafts verified, 0 for a request that took no part.
            accepted: ``[R]`` how many of them were accepted.

        Raises:
            ValueError: more accepted than verified, or verified than predicted.
        """
        width = made.survival.shape[1]
        if (accepted > num_drafts).any() or (num_drafts > width).any():
            raise ValueError(
                f"accepted {accepted} of {num_drafts} drafts of {width}: accepted may "
                "not exceed the verified, nor these the predicted"
            )
        position = np.arange(width)
        verified = position < num_drafts[:, None]
        hit = position < accepted[:, None]
        self.window.add(made.survival, verified, hit)
        rows = made.rows
        if made.epoch != self._epoch:  # their rows may be others' by now
            rows = np.array([self._rows.get(i, 0) for i in made.ids], dtype=np.int64)
        reached, outcome, predicted = np.empty((3, 2, len(rows), width))
        known = verified & made.usable
        known[:, 1:] &= hit[:, :-1]
        reached[CONFIDENCE], outcome[CONFIDENCE] = known, hit & known
        predicted[CONFIDENCE] = made.conditional
        # History: outcomes, and past the verified drafts what confidences promise.
        promised = made.conditional * made.usable
        alive = np.cumprod(np.where(verified, hit, promised), axis=1)
        reached[HISTORY], outcome[HISTORY] = verified | made.usable, alive
        reached[HISTORY, :, 1:] *= alive[:, :-1]
        predicted[HISTORY] = self._from_history(rows, width)
        found = evidence(reached, outcome, predicted)
        self._maps.learn(made.logit, found)
        self._offsets.learn(rows, found)

    def rest(self) -> None:
        """A step without drafts (bypass) has gone by.

        Estimates stay, their evidence fades: after a long bypass a short probe must be
        able to convince.
        """
        self._maps.age()
        self._offsets.age()

    def forget(self, ids: Iterable[Hashable]) -> None:
        """Drop requests that have ended; unknown ones are fine."""
        for name in ids:
            row = self._rows.pop(name, None)
            if row is not None:
                self._free.append(row)
                self._epoch += 1

    def _from_history(self, rows: Ints, width: int) -> Floats:
        rates = self._prior_logit + self._maps.rates(width)
        return sigmoid(rates + self._offsets.of(HISTORY, rows))

    def _find(self, ids: Sequence[Hashable], temperatures: Sequence[float]) -> Ints:
        """Rows ``[R]`` of requests."""
        if len(temperatures) != len(ids):
            raise ValueError(
                f"{len(ids)} requests but {len(temperatures)} temperatures: give one "
                "for each"
            )
        known = self._rows
        try:
            return np.array(list(map(known.__getitem__, ids)), dtype=np.int64)
        except KeyError:
            for name, temperature in zip(ids, temperatures, strict=True):
                if name not in known:
                    known[name] = self._start(temperature)
            return np.array([known[name] for name in ids], dtype=np.int64)

    def _start(self, temperature: float) -> int:
        row = self._free.pop() if self._free else len(self._rows) + 1
        self._offsets.start(row)
        if row >= len(self._setting):
            self._setting = np.concatenate(
                [self._setting, np.zeros_like(self._setting)]
            )
        self._setting[row] = self._start_maps.setting(temperature)
        return row

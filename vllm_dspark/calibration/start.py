"""The calibration file's maps for requests of any temperature at once.

What `scaling` does for recorded rounds of one temperature, for every step of a server:
in one pass over the batch, on logits, which is where `online` goes on from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.file import Calibration
from vllm_dspark.calibration.rounds import Floats, Ints
from vllm_dspark.calibration.scaling import identity

# Outcomes cannot confirm confidences nearer to 0 or 1 than these logits (0.9997), and
# a single one beyond would outweigh everything else in the regression.
MAX_LOGIT = 8.0
_EDGE = float(1 / (1 + np.exp(MAX_LOGIT)))


class StartingMaps:
    """The file's maps of K positions; confidences as they are without a file.

    Raises:
        ValueError: the calibration covers fewer positions than ``width``.
    """

    def __init__(self, width: int, calibration: Calibration | None) -> None:
        self._calibration = calibration
        scalings = list(calibration.settings.values()) if calibration else []
        for scaling in scalings:
            if scaling.width < width:
                raise ValueError(
                    f"the calibration covers {scaling.width} positions, fewer than "
                    f"the {width} drafted: calibrate again with "
                    f"--num-speculative-tokens {width}"
                )
        self._scalings = scalings or [identity(width)]
        slope = np.array([1 / np.array(s.temperature[:width]) for s in self._scalings])
        bias = np.array([s.bias[:width] for s in self._scalings])
        # [2, S, K] of S settings; the same with certainties, [3, S, K], where a
        # setting mixes them in.
        self._plain = np.array([slope, bias])
        self._mixed = np.array([slope, np.zeros_like(slope), bias])
        self._mixes = any(s.mixing for s in self._scalings)
        for i, mixing in enumerate(s.mixing for s in self._scalings):
            if mixing is not None:
                self._mixed[0, i] = mixing.weight[:width]
                self._mixed[1, i] = mixing.certainty[:width]
                self._mixed[2, i] = mixing.bias[:width]

    def setting(self, temperature: float) -> int:
        """Number of the setting for requests of a temperature."""
        if self._calibration is None:
            return 0
        chosen = self._calibration.scaling(temperature)
        return next(i for i, s in enumerate(self._scalings) if s is chosen)

    def coefficients(self, settings: Ints) -> tuple[Floats, Floats]:
        """Slopes and biases ``[R, K]`` of rows of settings ``[R]``."""
        slope, bias = _chosen(self._plain, settings)
        return slope, bias

    def logits(
        self,
        confidence: NDArray[np.floating[Any]],
        settings: Ints,
        certainty: NDArray[np.floating[Any]] | None = None,
    ) -> Floats:
        """Logits within ±8 of ``confidence`` [R, k], by each row's setting ``[R]``.

        Args:
            certainty: ``[R, k]``, not finite where there is none; None: nowhere.
        """
        c = np.minimum(np.maximum(confidence.astype(np.float64), _EDGE), 1 - _EDGE)
        x: Floats = np.log(c / (1 - c))
        if self._calibration is None:
            return x
        k = x.shape[1]
        slope, bias = _chosen(self._plain[:, :, :k], settings)
        y = x * slope + bias
        if certainty is not None and self._mixes:
            known = np.isfinite(certainty)
            weight, share, shift = _chosen(self._mixed[:, :, :k], settings)
            mixed = x * weight + np.where(known, certainty, 0.0) * share + shift
            y = np.where(known, mixed, y)
        mapped: Floats = np.minimum(np.maximum(y, -MAX_LOGIT), MAX_LOGIT)
        return mapped


def _chosen(maps: Floats, settings: Ints) -> Floats:
    """``[M, R, K]`` of maps ``[M, S, K]``, by the settings ``[R]`` of rows.

    Indexing would do, but gives up the interpreter's lock (see `schedule.step`).
    """
    chosen = np.repeat(maps[:, :1], len(settings), axis=1)
    for i in range(1, maps.shape[1]):
        chosen = np.where((settings == i)[:, None], maps[:, i : i + 1], chosen)
    return chosen

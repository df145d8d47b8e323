"""Scaling of confidences by position (paper, 3.2.1): applying and fitting one map.

A position's confidence becomes c' = σ(logit(c)/T + b). With T > 0 that keeps the order
within the position. The paper has a temperature only; the bias is ours, for heads that
are off by a constant. `fitting` settles the positions left to right.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.reliability import brier, ece, ece_floor
from vllm_dspark.calibration.rounds import Floats

TEMPERATURES = np.geomspace(0.2, 5.0, 81)  # has 1.0 in its middle
BIASES = np.linspace(-3.0, 3.0, 25)
# Logits of confidences nearer to 0 or 1 than float32 tells apart mean nothing.
_EDGE = 1e-7
KINDS: tuple[str, ...] = ("none", "temperature", "bias")


@dataclass(frozen=True)
class Mixing:
    """σ(weight·logit(c) + certainty·z + bias) of positions 1..K (`mixing`)."""

    weight: tuple[float, ...]
    certainty: tuple[float, ...]
    bias: tuple[float, ...]

    def apply(self, confidence: Floats, certainty: Floats, otherwise: Floats) -> Floats:
        """Mixed confidences ``[N, k]``, k ≤ K; ``otherwise`` without a certainty."""
        k = confidence.shape[1]
        weight, share, bias = (
            np.array(v[:k]) for v in (self.weight, self.certainty, self.bias)
        )
        known = np.isfinite(certainty)
        x = logit(confidence) * weight + np.where(known, certainty, 0.0) * share + bias
        mixed: Floats = np.where(known, sigmoid(x), otherwise)
        return mixed


@dataclass(frozen=True)
class Scaling:
    """The maps of positions 1..K; temperature 1 and bias 0 change nothing.

    Args:
        temperature, bias: of confidences alone.
        mixing: instead of both, where there is a certainty.
    """

    temperature: tuple[float, ...]
    bias: tuple[float, ...]
    mixing: Mixing | None = None

    @property
    def width(self) -> int:
        """K, the positions it covers."""
        return len(self.temperature)

    def apply(self, confidence: Floats, certainty: Floats | None = None) -> Floats:
        """Calibrated confidences ``[N, k]`` for k ≤ K; NaN stays NaN.

        Args:
            confidence: ``[N, k]`` raw.
            certainty: ``[N, k]``, NaN where there is none; None: nowhere.

        Raises:
            ValueError: more positions than were calibrated.
        """
        if confidence.shape[1] > self.width:
            raise ValueError(
                f"the calibration covers {self.width} positions, but there are "
                f"confidences of {confidence.shape[1]}; calibrate again with "
                f"--num-speculative-tokens {confidence.shape[1]}"
            )
        columns = [
            scale(confidence[:, k], self.temperature[k], self.bias[k])
            for k in range(confidence.shape[1])
        ]
        plain = np.stack(columns, axis=1) if columns else confidence.copy()
        if self.mixing is None or certainty is None:
            return plain
        return self.mixing.apply(confidence, certainty, plain)


def identity(width: int) -> Scaling:
    """The scaling that changes nothing."""
    return Scaling((1.0,) * width, (0.0,) * width)


def logit(confidence: Floats) -> Floats:
    """log(c / (1 − c)), finite for 0 and 1 too."""
    inner = np.clip(confidence, _EDGE, 1 - _EDGE)
    odds: Floats = np.log(inner) - np.log1p(-inner)
    return odds


def scale(confidence: Floats, temperature: float, bias: float) -> Floats:
    """σ(logit(c)/T + b)."""
    if temperature == 1.0 and bias == 0.0:
        return confidence
    return sigmoid(logit(confidence) / temperature + bias)


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^−x), for logits that are not extreme."""
    p: Floats = 1 / (1 + np.exp(-x))
    return p


def fit_position(
    before: Floats, confidence: Floats, hit: NDArray[np.bool_], kind: str
) -> tuple[float, float]:
    """Temperature and bias of one position, from a grid.

    Minimises the ECE of the survival, down to what perfect predictions would show on
    these rounds; of the maps that get there, all as good as far as anyone can tell,
    the one with the lowest Brier score. (The ECE alone is 0 also for a constant at the
    right height, and on few rounds for other maps that tell hits and misses apart
    badly.)

    Args:
        before: [N] survival up to the position before, already calibrated.
        confidence: [N] raw confidences of the position.
        hit: [N] whether its draft was accepted (with all before it).
        kind: of `KINDS`.
    """
    if kind == KINDS[0] or len(confidence) == 0:
        return 1.0, 0.0
    raw = logit(confidence)

    def error(point: tuple[float, float]) -> tuple[float, float]:
        value = before * sigmoid(raw / point[0] + point[1])
        return max(0.0, ece(value, hit) - ece_floor(value)), brier(value, hit)

    if kind == KINDS[1]:
        return min(_grid(TEMPERATURES, np.zeros(1)), key=error)
    best = min(_grid(TEMPERATURES[::5], BIASES), key=error)
    ratio = TEMPERATURES[1] / TEMPERATURES[0]
    near = best[0] * ratio ** np.arange(-4, 5)
    return min(_grid(near, best[1] + np.linspace(-0.25, 0.25, 11)), key=error)


def _grid(temperatures: Floats, biases: Floats) -> Iterator[tuple[float, float]]:
    return ((float(t), float(b)) for t in temperatures for b in biases)

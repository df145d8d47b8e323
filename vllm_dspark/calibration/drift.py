"""Maps of confidences that follow outcomes and forget old ones.

P(draft k accepted given 1..k−1 were) = σ(slope_k·x_k + bias_k + u), with x_k the logit
of the confidence, or 0 for history alone, and u the offset of the request. The paper's
maps (3.2.1) stay as fitted; here every step adds its outcomes, as one Newton step of a
logistic regression in which older evidence has faded. Where evidence is lacking (a
position that trimming never lets through) the map goes over into what the positions
have in common, so that no verdict lasts by not being tested.

This module knows nothing of requests' names, files or schedulers.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from vllm_dspark.calibration.rounds import Floats, Ints

CONFIDENCE, HISTORY = 0, 1  # the two maps, M = 2
# What lies beyond is a run of odd outcomes, not a workload.
_OFFSET = 4.0
_LOWEST = np.array([-8.0, -0.95])[:, None, None]  # bias, slope minus 1
_HIGHEST = np.array([8.0, 2.0])[:, None, None]


@dataclass(frozen=True)
class DriftOptions:
    """How fast outcomes count and fade.

    A weight w is a prior precision in logits⁻²: a deviation of 1/√w is usual.

    Args:
        memory_steps: steps after which evidence counts 1/e.
        memory_outcomes: with few requests evidence lasts longer, until about this
            many rounds came in.
        bias_weight: of a position's bias, from what the positions have in common.
        slope_weight: of a position's slope, likewise.
        common_positions: what is common is held to nothing (the file's maps) as
            firmly as by this many positions without a deviation.
        request_weight: of a request's offset, from 0.
        request_memory: rounds of a request after which its evidence counts 1/e.
    """

    memory_steps: float = 60.0
    memory_outcomes: float = 120.0
    bias_weight: float = 4.0
    slope_weight: float = 16.0
    common_positions: float = 1.0
    request_weight: float = 6.0
    request_memory: float = 40.0

    def __post_init__(self) -> None:
        for option in fields(self):
            value = getattr(self, option.name)
            if not 0 < value < float("inf"):
                raise ValueError(f"{option.name} {value}: give a positive number")


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a step's outcomes say about each position of each request, for both maps.

    Args:
        reached: ``[M, R, k]`` how much the outcome counts: 1 where all drafts before
            were accepted and it is known, 0 where not, between where it is inferred.
        excess: ``[M, R, k]`` outcome minus prediction, 0 where not reached.
        spread: ``[M, R, k]`` reached·p(1−p), the information in it.
    """

    reached: Floats
    excess: Floats
    spread: Floats


def evidence(reached: Floats, hit: Floats, predicted: Floats) -> Evidence:
    """Compare outcomes with predictions; all ``[M, R, k]``, hit at most reached."""
    expected = reached * predicted
    return Evidence(reached, hit - expected, expected * (1 - predicted))


class DriftingMaps:
    """The maps of confidences and of history, for K positions; the identity at first.

    They learn in one go because a step's time goes into numpy calls, not numbers.

    Args:
        width: K.
        options: speeds and weights.
    """

    def __init__(self, width: int, options: DriftOptions) -> None:
        count = 2
        self._options = options
        # Biases, and slopes minus 1, [2, M, K]; their weights.
        self._theta = np.zeros((2, count, width))
        self._weight = np.array([options.bias_weight, options.slope_weight])
        self._weight = self._weight[:, None, None]
        # Information in faded outcomes: on the bias, on both, on the slope.
        self._info = np.zeros((3, count, width))

    def logits(self, x: Floats) -> Floats:
        """``[R, k]`` of confidences with logits ``x`` [R, k], without offsets."""
        bias, slope = self._theta[:, CONFIDENCE, : x.shape[1]]
        mapped: Floats = x + (slope * x + bias)
        return mapped

    def coefficients(self) -> tuple[Floats, Floats]:
        """Slopes and biases ``[K]`` of confidences, as `logits` applies them."""
        bias, slope = self._theta[:, CONFIDENCE]
        return 1 + slope, bias

    def rates(self, width: int) -> Floats:
        """``[k]`` logits of history's first ``width`` positions, less the prior's."""
        return self._theta[0, HISTORY, :width]

    def learn(self, x: Floats, found: Evidence) -> None:
        """Take in one step's outcomes; a map without any stays as it is.

        Args:
            x: ``[R, k]`` the logits behind the predictions from confidences.
            found: for both maps.
        """
        k = x.shape[1]
        gained, pull = np.zeros_like(self._info), np.zeros_like(self._theta)
        gained[0, :, :k] = _over_requests(found.spread)
        pull[0, :, :k] = _over_requests(found.excess)
        weighted = found.spread[CONFIDENCE] * x
        gained[1, CONFIDENCE, :k] = _over_requests(weighted)
        gained[2, CONFIDENCE, :k] = np.einsum("rk,rk->k", weighted, x)
        pull[1, CONFIDENCE, :k] = np.einsum("rk,rk->k", found.excess[CONFIDENCE], x)
        options = self._options
        rounds = _over_requests(found.reached[:, :, :1])
        rate = np.minimum(1 / options.memory_steps, rounds / options.memory_outcomes)
        # Without outcomes the rate is 0: what was known last stays known.
        self._step(np.exp(-rate), gained, pull)

    def age(self) -> None:
        """A step without drafts: what is known stays, but gives way sooner."""
        self._info *= np.exp(-1 / self._options.memory_steps)

    def _step(self, fade: Floats, gained: Floats, pull: Floats) -> None:
        """Newton step from faded evidence, what is common, and the new outcomes."""
        # Evidence decides how much a position says about what is common.
        trust = self._info[0] / (self._info[0] + self._weight[0])
        total = trust.sum(axis=1, keepdims=True) + self._options.common_positions
        common = np.einsum("pmk,mk->pm", self._theta, trust / total)[:, :, None]
        own = self._theta - common
        self._info = fade * self._info + gained
        pull += fade * self._weight * own + self._info[:2] * own[0]
        pull += self._info[1:] * own[1]
        on_bias, on_slope = self._info[::2] + self._weight
        on_both = self._info[1]
        determinant = on_bias * on_slope - on_both * on_both
        own[0] = on_slope * pull[0] - on_both * pull[1]
        own[1] = on_bias * pull[1] - on_both * pull[0]
        theta = common + own / determinant
        self._theta = np.minimum(np.maximum(theta, _LOWEST), _HIGHEST)


def _over_requests(values: Floats) -> Floats:
    # A product with ones is several times faster than a sum over an outer axis.
    total: Floats = np.ones(values.shape[-2]) @ values
    return total


class Offsets:
    """How much better or worse than M maps say each request fares, in logits.

    Kept by row. Row 0 stands for requests that are gone, and stays 0.

    Args:
        count: M.
        options: speeds and weights.
    """

    def __init__(self, count: int, options: DriftOptions) -> None:
        self._weight = options.request_weight
        self._fade = float(np.exp(-1 / options.request_memory))
        self._value, self._info = np.zeros((count, 1)), np.zeros((count, 1))

    def of(self, number: int, rows: Ints) -> Floats:
        """``[R, 1]`` of one map and rows ``[R]``."""
        values: Floats = self._value[number][rows]
        return values[:, None]

    def start(self, row: int) -> None:
        """A row is a new request's from now on."""
        while row >= self._value.shape[1]:
            more = np.zeros_like(self._value)  # doubles, so that growing is rare
            self._value = np.concatenate([self._value, more], axis=1)
            self._info = np.concatenate([self._info, more], axis=1)
        self._value[:, row] = self._info[:, row] = 0.0

    def age(self) -> None:
        """See `DriftingMaps.age`."""
        self._info *= self._fade

    def learn(self, rows: Ints, found: Evidence) -> None:
        """Take in one step's outcomes of rows ``[R]``, each there once (or row 0)."""
        ones = np.ones(found.spread.shape[2])
        value = self._value.take(rows, axis=1)
        # The evidence of those without outcomes does not fade.
        fade = 1 - (1 - self._fade) * (found.reached[:, :, 0] > 0)
        info = fade * self._info.take(rows, axis=1) + found.spread @ ones
        right = (info + fade * self._weight) * value + found.excess @ ones
        value = np.minimum(np.maximum(right / (info + self._weight), -_OFFSET), _OFFSET)
        for number in range(len(value)):
            self._value[number][rows] = value[number]
            self._info[number][rows] = info[number]
        self._value[:, 0] = self._info[:, 0] = 0.0

"""Which drafts are accepted and what the confidence head says of them, by chance.

Draft k of a request of dataset d is accepted, given that those before it were, with
probability p = σ(μ_k + s_k·z + u): z is standard normal and anew for every draft, u an
offset of the request. μ_k makes the mean of p the dataset's conditional acceptance, s_k
makes a confidence that shows p have the AUROC that was measured. The head shows
σ(t·logit p + b_k): t and b make confidences wrong and leave their order as it was.
Nothing here knows of schedulers or time.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
import numpy as np
from numpy.typing import NDArray

from vllm_dspark.calibration.scaling import sigmoid

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

KIND = "dspark-acceptance"
# Points of a standard normal with equal weights, for means over z.
_Z = np.array(
    [math.sqrt(2) * x for x in np.polynomial.hermite.hermgauss(64)[0]], dtype=np.float64
)
_WEIGHTS = np.polynomial.hermite.hermgauss(64)[1] / math.sqrt(math.pi)
_MAX_SPREAD = 12.0  # logits; AUROC 0.99 needs less at any rate


@dataclass(frozen=True)
class Dataset:
    """How a drafter fares on one kind of text.

    Args:
        conditional: [γ] P(draft k accepted | k−1 accepted).
        auc: [γ] AUROC of c_k, 0.5 to 0.99.
        excess: [γ] mean confidence less acceptance, above 0 for overconfidence.
        prompt_tokens: lengths of its prompts; empty where they are not known.
    """

    conditional: tuple[float, ...]
    auc: tuple[float, ...]
    excess: tuple[float, ...]
    prompt_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.conditional) == len(self.auc) == len(self.excess) >= 1:
            raise ValueError(
                "conditional, auc and excess must cover the same positions"
            )
        for name, low, high in (("conditional", 0, 1), ("auc", 0, 1)):
            for value in getattr(self, name):
                if not low <= value <= high:
                    raise ValueError(f"{name} {value}: give {low} to {high}")

    @property
    def tau(self) -> float:
        """Tokens of a round that verifies all positions."""
        return 1.0 + float(np.cumprod(self.conditional).sum())


@dataclass(frozen=True)
class Acceptance:
    """A drafter's acceptance.

    Args:
        name: of the drafter, and where the figures are from.
        datasets: by name; requests take them in turn.
        request_spread: standard deviation of u, logits.
        slope: t, how far confidences are spread against the truth.
        bias: added to every confidence's logit, on top of the measured excess.
        informed: False for a head that always shows the mean (AUROC 0.5).
    """

    name: str
    datasets: dict[str, Dataset]
    request_spread: float = 0.0
    slope: float = 1.0
    bias: float = 0.0
    informed: bool = True

    @property
    def width(self) -> int:
        """γ."""
        return len(next(iter(self.datasets.values())).conditional)

    def calibrated(self) -> Acceptance:
        """The same drafter with confidences that are right on average."""
        exact = {
            name: replace(d, excess=(0.0,) * len(d.excess))
            for name, d in self.datasets.items()
        }
        return replace(self, datasets=exact, slope=1.0, bias=0.0)


class Drafter:
    """Draws drafts of an acceptance model.

    Args:
        acceptance: what to draw from.
        seed: of every draw.
    """

    def __init__(self, acceptance: Acceptance, seed: int) -> None:
        self.acceptance = acceptance
        self._random = np.random.default_rng(seed)
        names = list(acceptance.datasets)
        self._number = {name: i for i, name in enumerate(names)}
        spread_u = acceptance.request_spread
        rows = [_maps(acceptance.datasets[n], acceptance, spread_u) for n in names]
        self._mean, self._spread, self._bias = np.array(rows).transpose(1, 0, 2)

    def number(self, dataset: str) -> int:
        """A dataset's, for `draw`."""
        return self._number[dataset]

    def offset(self) -> float:
        """u of a new request."""
        return float(self._random.normal() * self.acceptance.request_spread)

    def draw(
        self, datasets: Ints, offsets: Floats, positions: int
    ) -> tuple[Floats, Ints]:
        """Drafts of R requests.

        Args:
            datasets: ``[R]`` numbers of datasets.
            offsets: ``[R]`` u.
            positions: drafted, at most γ.

        Returns:
            Confidences ``[R, positions]``, and ``[R]`` how many drafts the target would
            accept if all were verified.
        """
        shape = len(datasets), positions
        z, luck = self._random.normal(size=shape), self._random.random(shape)
        mean, spread = self._mean[datasets, :positions], self._spread[datasets]
        logit = mean + spread[:, :positions] * z + offsets[:, None]
        hit = luck < _sigmoid(logit)
        shown = logit if self.acceptance.informed else mean
        shown = self.acceptance.slope * shown + self._bias[datasets, :positions]
        return _sigmoid(shown), np.cumprod(hit, axis=1).sum(axis=1)


def _maps(data: Dataset, acceptance: Acceptance, spread_u: float) -> Floats:
    """``[3, γ]`` μ, s and b of a dataset."""
    t, found = acceptance.slope, []
    figures = zip(data.conditional, data.auc, data.excess, strict=True)
    for rate, auc, excess in figures:
        spread = _spread_of(rate, auc)
        both = math.hypot(spread, spread_u)
        mean = _solve(lambda m, s=both: _mean(m, s), rate)
        shown = t * both if acceptance.informed else 0.0
        bias = 0.0  # of an exact head; any other's mean is off by the excess
        if excess or not acceptance.informed:
            wanted = min(max(rate + excess, 1e-3), 1 - 1e-3)
            bias = _solve(lambda b, s=shown: _mean(b, s), wanted) - t * mean
        found.append((mean, spread, bias + acceptance.bias))
    return np.array(found).T


def _sigmoid(x: Floats) -> Floats:
    return sigmoid(np.clip(x, -40, 40))


def _mean(mean: float, spread: float) -> float:
    """E σ(mean + spread·z)."""
    return float(_WEIGHTS @ _sigmoid(mean + spread * _Z))


def _auroc(mean: float, spread: float) -> float:
    """Of p = σ(mean + spread·z) against outcomes of chance p."""
    p = _sigmoid(mean + spread * _Z)
    hit, miss = _WEIGHTS * p, _WEIGHTS * (1 - p)
    below = np.cumsum(miss) - miss / 2
    return float(hit @ below / (hit.sum() * miss.sum()))


def _spread_of(rate: float, auc: float) -> float:
    """s with which a head that shows p has this AUROC."""
    if not 1e-6 < rate < 1 - 1e-6 or auc <= 0.5:
        return 0.0

    def auroc(spread: float) -> float:
        return _auroc(_solve(lambda m: _mean(m, spread), rate), spread)

    return _solve(auroc, min(auc, 0.99), 0.0, _MAX_SPREAD)


def _solve(rising: Any, wanted: float, low: float = -40.0, high: float = 40.0) -> float:
    """Where a rising function has a value, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < wanted else (low, middle)
    return (low + high) / 2


def constant(rate: float, width: int, auc: float = 0.5) -> Acceptance:
    """The same chance for every draft; for tests and what-if."""
    one = Dataset((rate,) * width, (auc,) * width, (0.0,) * width)
    return Acceptance(f"constant {rate:g}", {"all": one})


def rate_of(tau: float, width: int) -> float:
    """The constant acceptance with which γ drafts give τ tokens per round."""
    return _solve(lambda c: float(np.sum(c ** np.arange(width + 1))), tau, 0.0, 1.0)


def read(path: Path, temperature: float | None = None) -> Acceptance:
    """An acceptance file of ours, or what ``vllm-dspark evaluate --json`` wrote.

    Args:
        path: the file.
        temperature: which of an evaluation's; its first if None.

    Raises:
        ValueError: it is neither, or has no such temperature.
    """
    raw = json.loads(path.read_text())
    if raw.get("kind") == KIND:
        datasets = {name: dataset(d) for name, d in raw["datasets"].items()}
        return Acceptance(raw["name"], datasets, raw.get("request_spread", 0.0))
    runs = raw.get("runs")
    if not isinstance(runs, list) or not runs:
        raise ValueError(f"{path}: neither an acceptance file nor an evaluation")
    fits = [r for r in runs if temperature in (None, r["temperature"])]
    if not fits:
        raise ValueError(f"{path} has no rounds at temperature {temperature}")
    return Acceptance(
        f"{fits[0]['name']} ({path.name})",
        {name: _evaluated(d) for name, d in fits[0]["datasets"].items()},
    )


def dataset(raw: dict[str, Any]) -> Dataset:
    """A dataset of our own files: by position, or one τ for γ positions."""
    if "tau" in raw:
        width = raw["positions"]
        conditional = [rate_of(raw["tau"], width)] * width
    else:
        conditional = raw["conditional"]
        width = len(conditional)

    def by_position(key: str, default: float) -> tuple[float, ...]:
        value = raw.get(key, default)
        return tuple(value) if isinstance(value, list) else (float(value),) * width

    return Dataset(
        tuple(conditional),
        by_position("auc", 0.5),
        by_position("excess", 0.0),
        tuple(raw.get("prompt_tokens", ())),
    )


def _evaluated(raw: dict[str, Any]) -> Dataset:
    """A dataset of an evaluation; figures that it lacks repeat the one before."""
    conditional = _filled(raw["acceptance_conditional"], 0.5)
    auc = _filled(raw["auc"], 0.7)
    # ECE has no sign; DSpark's raw confidences are too high (README of the drafter).
    excess = _filled(raw["ece_conditional"], 0.0)
    return Dataset(conditional, tuple(max(a, 0.5) for a in auc), excess)


def _filled(values: list[float | None], first: float) -> tuple[float, ...]:
    found: list[float] = []
    for value in values:
        known = value is not None and math.isfinite(value)
        found.append(float(value) if known else (found[-1] if found else first))
    return tuple(found)

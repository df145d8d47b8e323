"""How fast other verify lengths would have been: recorded rounds and a cost curve.

Rounds are drawn into steps of R requests. A step costs what the curve says for its
tokens, Σ (1 + ℓ), and for drafting; it emits 1 + min(ℓ, accepted) per request. The
oracle verifies exactly what will be accepted: no confidence can do better, and its
distance to the calibrated ones is what better confidences could win.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dspark.calibration.rounds import Floats, Ints, Rounds, survival

_STEPS = 2000  # simulated per policy


@dataclass(frozen=True)
class CostCurve:
    """Milliseconds of a step; linear between the points, and beyond the last two.

    Args:
        verify: (tokens in the target's step, ms), tokens increasing.
        draft: (requests drafted for, ms).
    """

    verify: tuple[tuple[float, float], ...]
    draft: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        for name, points in (("verify", self.verify), ("draft", self.draft)):
            at = [x for x, _ in points]
            if len(points) < 2 or at != sorted(set(at)) or at[0] <= 0:
                raise ValueError(
                    f"cost curve {name} {points}: give at least two points, "
                    "positive and increasing"
                )
            if min(ms for _, ms in points) <= 0:
                raise ValueError(f"cost curve {name} {points}: ms must be positive")

    def step_ms(self, tokens: Floats) -> Floats:
        """Target steps of so many tokens."""
        return _interpolate(tokens, self.verify)

    def draft_ms(self, requests: int) -> float:
        """One drafting for so many requests."""
        return float(_interpolate(np.array([float(requests)]), self.draft)[0])


# The demo pair on two cores, from benchmarks/results/round.json and round-32.json:
# rounds of 1, 4 and 8 tokens (one request) and of 256 (32 requests), drafting apart.
DEMO_COST = CostCurve(
    verify=((1, 23.02), (4, 23.59), (8, 23.80), (256, 79.81)),
    draft=((1, 4.13), (32, 13.59)),
)


def parse_curve(text: str) -> tuple[tuple[float, float], ...]:
    """Read ``1:23.0,8:23.8,256:79.8``.

    Raises:
        ValueError: not of that form.
    """
    try:
        pairs = [pair.split(":") for pair in text.split(",")]
        return tuple((float(x), float(ms)) for x, ms in pairs)
    except ValueError:
        raise ValueError(
            f"cost curve {text!r}: write points as tokens:milliseconds,… such as "
            "1:23.0,8:23.8,256:79.8"
        ) from None


def _interpolate(x: Floats, points: tuple[tuple[float, float], ...]) -> Floats:
    at, ms = np.array(points).T
    inside: Floats = np.interp(x, at, ms)
    slope = (ms[-1] - ms[-2]) / (at[-1] - at[-2])
    return np.where(x > at[-1], ms[-1] + slope * (x - at[-1]), inside)


def simulate(
    rounds: Rounds, calibrated: Floats, requests: int, cost: CostCurve
) -> dict[str, float]:
    """Tokens per second by policy, with ``requests`` decoding at a time.

    Args:
        rounds: of full length, with confidences.
        calibrated: [N, K] calibrated confidences.

    Returns:
        ``none`` (no speculation), ``fixed 1``… ``fixed K``, ``raw``, ``calibrated``
        and ``oracle``.
    """
    random = np.random.default_rng(0)
    rows = random.integers(len(rounds), size=(_STEPS, requests))
    accepted = rounds.accepted[rows]
    drafts = cost.draft_ms(requests)
    plain = cost.step_ms(np.array([float(requests)]))[0]
    speeds = {"none": 1000 * requests / float(plain)}

    def speed(lengths: Ints) -> float:
        tokens = (1 + lengths).sum(axis=1).astype(np.float64)
        emitted = (1 + np.minimum(accepted, lengths)).sum()
        return float(1000 * emitted / (cost.step_ms(tokens) + drafts).sum())

    for length in range(1, rounds.width + 1):
        speeds[f"fixed {length}"] = speed(np.minimum(rounds.num_drafts, length)[rows])
    for name, confidence in (("raw", rounds.confidence), ("calibrated", calibrated)):
        a = np.nan_to_num(survival(confidence))
        speeds[name] = speed(np.stack([plan(a[step], cost, drafts) for step in rows]))
    speeds["oracle"] = speed(accepted)
    return speeds


def plan(survivals: Floats, cost: CostCurve, draft_ms: float) -> Ints:
    """Verify lengths of one step by the paper's Algorithm 1.

    Takes positions by falling survival and stops at the first that lowers the
    throughput. Survivals fall along a request, so what is taken are prefixes.

    Args:
        survivals: [R, K].
        draft_ms: what the step's drafting costs, whatever is verified.

    Returns:
        ℓ ``[R]``.
    """
    requests, width = survivals.shape
    order = np.argsort(-survivals.ravel(), kind="stable")
    emitted = requests + np.concatenate([[0.0], np.cumsum(survivals.ravel()[order])])
    tokens = requests + np.arange(len(emitted), dtype=np.float64)
    speed = emitted / (cost.step_ms(tokens) + draft_ms)
    drops = np.nonzero(speed[1:] <= speed[:-1])[0]
    taken = order[: drops[0]] if len(drops) else order
    lengths: Ints = np.bincount(taken // width, minlength=requests)
    return lengths

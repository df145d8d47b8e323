"""What speculation emits, exactly, by enumerating every draft; and planners that cheat.

Two tokens, A (0) and B (1), and blocks of K drafts are small enough to sum over all
that may happen. Confidences are any function of the tokens drawn so far, so they may
be tied to a token as closely as one likes. The cheating policies are negative controls:
a test of losslessness is worth something only if it catches them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_dspark.schedule.step import StepCost, VerifyStep, candidates, round_seconds

Prefix = tuple[int, ...]
# Verify lengths [R] from survivals [R, K] of the step.
Policy = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Request:
    """P(A) after each prefix for target and drafter, and the confidence after it.

    Args:
        target: for prefixes of 0..K tokens.
        draft: for prefixes of 0..K-1 tokens.
        confidence: c_{k+1} after k tokens, k < K.
    """

    target: dict[Prefix, float]
    draft: dict[Prefix, float]
    confidence: dict[Prefix, float]

    @property
    def width(self) -> int:
        """K."""
        return max(map(len, self.draft)) + 1

    def survival(self, drafts: Prefix) -> np.ndarray:
        """``[K]`` for these drafts."""
        return np.cumprod([self.confidence[drafts[:k]] for k in range(self.width)])

    def drafted(self, drafts: Prefix) -> float:
        """The probability of drawing these drafts."""
        return math.prod(
            two(self.draft[drafts[:k]])[token] for k, token in enumerate(drafts)
        )

    def emitted(self, drafts: Prefix, length: int) -> np.ndarray:
        """Distribution of the first K + 1 tokens when ``length`` drafts are verified.

        What the round leaves open the target draws afterwards. Shape: ``[2] * (K+1)``.
        """
        out = np.zeros((2,) * (self.width + 1))
        reached = 1.0
        for k in range(length):
            prefix, token = drafts[:k], drafts[k]
            p, q = two(self.target[prefix]), two(self.draft[prefix])
            accept = min(1.0, p[token] / q[token])
            residual = np.maximum(p - q, 0.0)
            for other in (0, 1):
                if accept < 1:
                    share = residual[other] / residual.sum()
                    self._go_on(out, (*prefix, other), reached * (1 - accept) * share)
            reached *= accept
        self._go_on(out, drafts[:length], reached)
        return out

    def _go_on(self, out: np.ndarray, prefix: Prefix, weight: float) -> None:
        if len(prefix) == out.ndim:
            out[prefix] += weight
            return
        for token in (0, 1):
            share = two(self.target[prefix])[token]
            self._go_on(out, (*prefix, token), weight * share)


def two(p_first: float) -> np.ndarray:
    """The distribution of A and B."""
    return np.array([p_first, 1 - p_first])


def distribution(requests: Sequence[Request], policy: Policy) -> np.ndarray:
    """Joint distribution of the first K + 1 tokens of all requests, flat."""
    blocks = list(itertools.product((0, 1), repeat=requests[0].width))
    total = np.zeros(2 ** (len(requests) * (requests[0].width + 1)))
    for drawn in itertools.product(blocks, repeat=len(requests)):
        both = list(zip(requests, drawn, strict=True))
        lens = policy(np.stack([r.survival(drafts) for r, drafts in both]))
        joint = np.ones(1)
        for (request, drafts), length in zip(both, lens, strict=True):
            joint = np.outer(joint, request.emitted(drafts, int(length))).ravel()
        total += math.prod(r.drafted(drafts) for r, drafts in both) * joint
    return total


def bias(requests: Sequence[Request], policy: Policy) -> float:
    """Total variation between what a policy emits and what the target alone would."""
    target = distribution(requests, lambda survival: np.zeros(len(survival), int))
    return 0.5 * float(np.abs(distribution(requests, policy) - target).sum())


def random_request(random: np.random.Generator, width: int) -> Request:
    """Any target and drafter; confidences that often tie or are 0 or 1."""

    def table(most: int, draw: Callable[[], float]) -> dict[Prefix, float]:
        lengths = range(most + 1)
        every = (itertools.product((0, 1), repeat=n) for n in lengths)
        return {prefix: draw() for prefixes in every for prefix in prefixes}

    def probability() -> float:
        return float(random.uniform(0.05, 0.95))

    def confidence() -> float:
        return float(random.choice([0.0, 0.5, 0.8, 1.0, random.random()]))

    return Request(
        table(width, probability),
        table(width - 1, probability),
        table(width - 1, confidence),
    )


def naive_global(cost: StepCost, base_tokens: int) -> Policy:
    """Cheats: the best of all lengths by current confidences, no early stop."""

    def policy(survival: np.ndarray) -> np.ndarray:
        speed, order, drafts = _along(survival, base_tokens, cost)
        return drafts.lengths(order[: int(np.argmax(speed))])

    return policy


def over_plateaus(cost: StepCost, base_tokens: int) -> Policy:
    """Cheats: goes on where Θ stays as it is, and back if it never rises again."""

    def policy(survival: np.ndarray) -> np.ndarray:
        speed, order, drafts = _along(survival, base_tokens, cost)
        falls = np.flatnonzero(speed[1:] < speed[:-1])
        speed = speed[: falls[0] + 1] if len(falls) else speed
        return drafts.lengths(order[: int(np.argmax(speed))])

    return policy


def ties_by_later(count: int) -> Policy:
    """Cheats: the best ``count`` survivals, equals by their request's last survival."""

    def policy(survival: np.ndarray) -> np.ndarray:
        num_reqs, width = survival.shape
        keys = [
            (-survival[r, k], k, -survival[r, -1], r)
            for r in range(num_reqs)
            for k in range(width)
        ]
        taken = [key[-1] for key in sorted(keys)[:count]]
        return np.bincount(taken, minlength=num_reqs)

    return policy


def _along(survival: np.ndarray, base_tokens: int, cost: StepCost):
    drafts = candidates(VerifyStep(survival, base_tokens, cost))
    order = drafts.ranked(drafts.inside, drafts.survival)
    tokens = len(survival) + np.append(0.0, survival.ravel()[order].cumsum())
    return tokens / round_seconds(cost, base_tokens, len(order)), order, drafts

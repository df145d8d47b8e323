"""A simulated engine for the choice of draft length: costs, a drafter, arrivals."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vllm_dspark.schedule.drafting import (
    Drafting,
    DraftingChoice,
    Reason,
    StepFacts,
)
from vllm_dspark.schedule.drafting_options import DraftingOptions

WIDTH = 7


def step_seconds(tokens: float) -> float:
    """A target's step on a small CPU: nearly free, then full price."""
    return (
        float(np.interp(tokens, [1, 8, 32, 128, 1024], [26, 34, 75, 272, 2176])) / 1e3
    )


def draft_seconds(requests: int, positions: int) -> float:
    """Drafting; a bypass costs a little too (the drafter's context)."""
    return 0.0005 + (0.003 + 0.0005 * requests if positions else 0.0)


def throughput(requests: int, rates: np.ndarray) -> np.ndarray:
    """[γ + 1] tokens/s when drafts are accepted at these conditional rates [γ].

    Verification is trimmed to what pays, the same for every request.
    """
    survival = np.cumprod(rates)
    tau = 1 + np.concatenate([[0.0], np.cumsum(survival)])
    verify = [step_seconds(requests * (1 + length)) for length in range(WIDTH + 1)]
    speeds = []
    for positions in range(WIDTH + 1):
        draft = draft_seconds(requests, positions)
        speeds.append(
            max(
                requests * tau[length] / (verify[length] + draft)
                for length in range(positions + 1)
            )
        )
    return np.array(speeds)


class Engine:
    """Runs steps; what is predicted follows outcomes as an estimator would.

    Args:
        rate: conditional acceptance of the drafter; may be assigned to under way.
        noise: relative noise of each prediction.
    """

    def __init__(
        self,
        rate: float,
        options: DraftingOptions | None = None,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.drafting = Drafting(WIDTH, options)
        self.rate, self.noise = rate, noise
        self.lengths: list[int] = []
        self.reasons: list[Reason] = []
        self.allowed: np.ndarray | None = None
        self._random = np.random.default_rng(seed)
        self._estimate, self._outcomes = 0.7, 0

    def step(self, requests: int) -> DraftingChoice:
        predicted = throughput(requests, np.full(WIDTH, self._estimate))
        if self.noise:
            predicted *= np.exp(self._random.normal(0, self.noise, WIDTH + 1))
        choice = self.drafting.choose(
            StepFacts(predicted, requests, self._outcomes, self._estimate, self.allowed)
        )
        self._outcomes = requests if choice.positions else 0
        # As an estimator with a memory of 60 rounds of the engine, or of requests.
        weight = min(1.0, self._outcomes / 60) if self._outcomes else 0.0
        self._estimate += min(weight, 0.2) * (self.rate - self._estimate)
        self.lengths.append(choice.positions)
        self.reasons.append(choice.reason)
        return choice

    def run(self, loads: Iterable[int]) -> list[int]:
        """Lengths chosen over these loads."""
        return [self.step(load).positions for load in loads]

    def best(self, requests: int) -> int:
        """The length that is best in truth."""
        return int(np.argmax(throughput(requests, np.full(WIDTH, self.rate))))

    def loss(self, requests: int, lengths: list[int]) -> float:
        """Share of the best throughput that these lengths would lose."""
        true = throughput(requests, np.full(WIDTH, self.rate))
        seconds = [1 / true[length] for length in lengths]
        return 1 - 1 / float(np.mean(seconds)) / float(true.max())

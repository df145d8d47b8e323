"""An engine without a model: acceptance by chance, time by a table, load as told."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from vllm_dspark.schedule.controller import Controller
from vllm_dspark.schedule.cost import CostTable
from vllm_dspark.schedule.facts import Batch, StepTimes

# What a step of the demo target costs, as issue 4 gives it, and a drafter of 15%.
DEMO = CostTable(
    (1, 2, 4, 8, 16, 32, 64, 128),
    (0.026, 0.027, 0.027, 0.034, 0.046, 0.075, 0.139, 0.272),
    0.0,
    (1, 8, 64),
    (0, 7),
    ((0.001, 0.006), (0.002, 0.016), (0.008, 0.09)),
)
WIDTH = 7


@dataclass
class Engine:
    """Runs steps of a controller.

    Args:
        controller: under test.
        accept: chance that a draft is accepted given those before it were; confidences
            say it with a little noise.
        costs: what steps take in truth.
        with_confidence: False for a drafter without the head.
    """

    controller: Controller
    accept: float = 0.7
    costs: CostTable = DEMO
    with_confidence: bool = True
    tokens: float = 0.0
    seconds: float = 0.0
    drafted: int = 0  # positions that wait
    lengths: list[int] = field(default_factory=list)
    verified: list[float] = field(default_factory=list)  # mean of the requests
    verify_lens: list[np.ndarray] = field(default_factory=list)
    random: np.random.Generator = field(
        default_factory=lambda: np.random.default_rng(0)
    )

    def run(self, load: int, steps: int, goal: float | np.ndarray = 0.0) -> float:
        """Tokens/s over so many steps with so many requests; of all or ``[load]``."""
        tokens, seconds = self.tokens, self.seconds
        for _ in range(steps):
            self._step(load, goal)
        return (self.tokens - tokens) / (self.seconds - seconds)

    def _step(self, load: int, goal: float | np.ndarray) -> None:
        ids = tuple(f"request {i}" for i in range(load))
        chance = np.clip(self.accept + self.random.normal(0, 0.1, (load, WIDTH)), 0, 1)
        shown = chance[:, : self.drafted] if self.with_confidence else None
        counts = np.full(load, self.drafted)
        temperatures = (0.0,) * load
        goals = np.broadcast_to(goal, (load,)).astype(float)
        batch = Batch(ids, temperatures, counts, shown, 0, 100 * load, goals)
        choice = self.controller.draft(batch)
        plan, made = self.controller.verify(batch, choice.positions)
        hit = self.random.random((load, WIDTH)) < chance
        alive = np.cumprod(hit, axis=1).sum(axis=1)
        accepted = np.minimum(alive, plan.verify_lens)
        if made is not None:
            ones = np.ones(load, dtype=np.int64)
            self.controller.observe(made, plan.verify_lens, accepted, ones)
        b = load + int(plan.verify_lens.sum())
        target = float(self.costs.step_seconds(b))
        drafting = float(self.costs.draft_seconds(load, choice.positions))
        noise = self.random.lognormal(0, 0.03)
        drafts = (load, choice.positions, drafting * noise)
        times = StepTimes(b, 100 * load, target * noise, drafts, overhead=0.0)
        self.controller.timed(times)
        self.tokens += load + int(accepted.sum())
        self.seconds += target + drafting
        self.drafted = choice.positions
        self.lengths.append(choice.positions)
        self.verified.append(float(plan.verify_lens.mean()))
        self.verify_lens.append(plan.verify_lens)


def without(load: int, costs: CostTable = DEMO) -> float:
    """Tokens/s of vLLM alone."""
    return load / float(costs.step_seconds(load))

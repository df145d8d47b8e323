"""Cost curves, and the best plan there is, found by trying all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from vllm_dspark.schedule.planner import VerifyPlan, VerifyStep
from vllm_dspark.schedule.step import StepCost


def curve(seconds: Sequence[float], first: int = 1) -> StepCost:
    """Seconds by tokens, given one by one from ``first`` tokens on."""
    return lambda batch_tokens: np.asarray(seconds, dtype=float)[batch_tokens - first]


def random_step(random: np.random.Generator, seconds: np.ndarray) -> VerifyStep:
    """Up to three requests of up to three drafts, ragged."""
    shape = tuple(random.integers(1, 4, size=2))
    survival = np.cumprod(random.random(shape), axis=1)
    return VerifyStep(
        survival,
        base_tokens=shape[0] + int(random.integers(0, 3)),
        cost=curve(seconds),
        extra_seconds=float(random.choice([0.0, random.random()])),
        num_drafts=random.integers(0, shape[1] + 1, shape[0]),
    )


def tokens_and_seconds(
    step: VerifyStep, lens: Sequence[int]
) -> tuple[np.ndarray, float]:
    """``[R]`` expected tokens of each request, and seconds of the round, by hand."""
    rows = [1 + row[:n].sum() for row, n in zip(step.survival, lens, strict=True)]
    at = np.array([step.base_tokens + sum(lens)])
    return np.array(rows), float(step.cost(at)[0]) + step.extra_seconds


def speed(step: VerifyStep, lens: Sequence[int]) -> float:
    """Θ by hand."""
    tokens, seconds = tokens_and_seconds(step, lens)
    return float(tokens.sum()) / seconds


def every_plan(step: VerifyStep) -> list[tuple[int, ...]]:
    """All verify lengths there are."""
    most = step.num_drafts
    if most is None:
        most = [step.survival.shape[1]] * step.num_reqs
    return list(itertools.product(*(range(n + 1) for n in most)))


def best_speed(step: VerifyStep) -> float:
    """Θ of the best of all plans."""
    return max(speed(step, lens) for lens in every_plan(step))


def speeds_along(step: VerifyStep) -> np.ndarray:
    """Θ with the best 0, 1, … drafts, by hand."""
    pairs = sorted(
        (-a, r)
        for r, row in enumerate(step.survival)
        for a in row[: step.num_drafts[r]]
    )
    lens = [0] * step.num_reqs
    found = [speed(step, lens)]
    for _, r in pairs:
        lens[r] += 1
        found.append(speed(step, lens))
    return np.array(found)


def is_consistent(step: VerifyStep, plan: VerifyPlan) -> bool:
    """Whether a plan's figures are those of its verify lengths."""
    tokens, seconds = tokens_and_seconds(step, plan.verify_lens.tolist())
    return bool(np.allclose([plan.tokens, plan.seconds], [tokens.sum(), seconds]))

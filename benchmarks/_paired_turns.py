"""Turns that engines took at the same moment, compared (`paired_load.py`)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SAMPLES = 2000  # of the turns, for an interval


@dataclass(frozen=True)
class Turn:
    """What an engine did in one turn.

    Args:
        tokens: emitted.
        prompt_tokens: of the requests that began.
        seconds: that it took.
        steps: engine steps, each with about C requests.
        drafted, verified: draft tokens made and verified.
    """

    tokens: int
    prompt_tokens: int
    seconds: float
    steps: int
    drafted: int
    verified: int

    def work_rate(self, prompt_weight: float) -> float:
        """Tokens per second, a prompt token counted as so many."""
        return (self.tokens + prompt_weight * self.prompt_tokens) / self.seconds


def prompt_weight(turns: Sequence[Turn]) -> float:
    """What a prompt token takes, against a token emitted; 0 where turns do not say.

    The slope of seconds over prompt tokens, both per token emitted: the median of the
    slopes between all pairs of turns, which turns that were disturbed hardly move.
    """
    seconds = np.array([t.seconds / t.tokens for t in turns])
    prompts = np.array([t.prompt_tokens / t.tokens for t in turns])
    one, other = np.triu_indices(len(turns), 1)
    apart = prompts[one] != prompts[other]
    if not apart.any():
        return 0.0
    rise = (seconds[one] - seconds[other])[apart]
    slope = max(float(np.median(rise / (prompts[one] - prompts[other])[apart])), 0.0)
    emitted = float(np.median(seconds - slope * prompts))
    return slope / emitted if emitted > 0 else 0.0


def paired(
    one: Sequence[Turn], other: Sequence[Turn], weight: float
) -> dict[str, float]:
    """The median ratio of turns of the same moment, with a 95% interval of it."""
    turns = zip(one, other, strict=True)
    ratios = np.array([a.work_rate(weight) / b.work_rate(weight) for a, b in turns])
    random = np.random.default_rng(0)
    medians = np.median(random.choice(ratios, (SAMPLES, len(ratios))), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def summary(turns: dict[str, list[Turn]], load: int) -> dict[str, Any]:
    """Figures of one load: by arm, and the last arm against the best other one."""
    arms: dict[str, Any] = {}
    names = list(turns)
    reference = turns[names[0]]
    weight = prompt_weight(reference)
    for name, own in turns.items():
        per_step = load * sum(t.steps for t in own)
        arms[name] = {
            "output_throughput": statistics.median(t.work_rate(0) for t in own),
            "ratio": paired(own, reference, weight),
            "draft_length": sum(t.drafted for t in own) / per_step,
            "verify_length": sum(t.verified for t in own) / per_step,
            "turns": [asdict(t) for t in own],
        }
    last = turns[names[-1]]
    against = {n: paired(last, turns[n], weight) for n in names[:-1]}
    best = min(against, key=lambda n: against[n]["median"])
    return {
        "prompt_weight": weight,
        "arms": arms,
        "best_other": {"arm": best, **against[best]},
        "against": against,
    }

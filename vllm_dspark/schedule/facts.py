"""What the controller is told and says: batch, plan of drafting, totals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vllm_dspark.schedule.drafting import Reason
from vllm_dspark.schedule.step import Floats, Ints


@dataclass(frozen=True)
class Batch:
    """What the engine knows when it builds a step.

    Args:
        ids: the R requests that decode in it.
        temperatures: ``[R]``.
        num_drafts: ``[R]`` drafts that wait for verification.
        confidence: ``[R, k]`` raw c_1..c_k of those, NaN past a row's last draft;
            None without a confidence head.
        prefill_tokens: further tokens of the step.
        context_tokens: tokens that the R requests attend to.
        slo_tps: ``[R]`` goals, 0 for none.
        certainty: ``[R, k]`` z_1..z_k of the drafts, NaN where there is none; None if
            there is none at all.
    """

    ids: tuple[str, ...]
    temperatures: tuple[float, ...]
    num_drafts: Ints
    confidence: NDArray[np.floating] | None
    prefill_tokens: int
    context_tokens: int
    slo_tps: Floats
    certainty: NDArray[np.floating] | None = None

    @property
    def base_tokens(self) -> int:
        """Tokens of the step without any draft."""
        return len(self.ids) + self.prefill_tokens


@dataclass(frozen=True)
class StepTimes:
    """What a step took.

    Args:
        batch_tokens: B.
        context_tokens: as in `Batch`.
        target_seconds: of the worker, drafting not included.
        drafted: requests, positions and seconds of drafting, if there was any.
        prompt_tokens: how many of B are of prompts.
        overhead: seconds outside the worker before it; None if the engine idled.
        after_drafts: the step before it had drafts or made some, so that the overhead
            is one with drafts.
        verified: how many of B are drafts.
    """

    batch_tokens: int
    context_tokens: int
    target_seconds: float
    drafted: tuple[int, int, float] | None = None
    prompt_tokens: int = 0
    overhead: float | None = None
    after_drafts: bool = False
    verified: int = 0


@dataclass(frozen=True)
class DraftPlan:
    """What the step drafts at its end.

    Args:
        positions: of each request, 0..γ.
        reason: why.
        skip: requests that get none, by their own history.
    """

    positions: int
    reason: Reason
    skip: frozenset[str] = frozenset()


@dataclass
class Totals:
    """Counts since the start, for logs and metrics.

    Args:
        drafted: tokens the worker drafted.
        verified: drafts verified.
        trimmed: drafts the planner left out; those of a request that has ended are
            neither.
        accepted: drafts accepted.
        expected: survivals summed over the verified, what ``accepted`` should be.
        rounds: of requests that emitted tokens in a step with drafts.
        planner_seconds: that choosing lengths took.
        verify_lens: lengths chosen, by request and step.
        draft_lens: lengths chosen, by step.
    """

    steps: int = 0
    drafted: int = 0
    verified: int = 0
    trimmed: int = 0
    accepted: int = 0
    expected: float = 0.0
    rounds: int = 0
    bypassed_steps: int = 0
    planner_seconds: float = 0.0
    stops: Counter[str] = field(default_factory=Counter)
    verify_lens: Counter[int] = field(default_factory=Counter)
    draft_lens: Counter[int] = field(default_factory=Counter)

"""A step that was built and is under way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.schedule.drafting import Reason


@dataclass(frozen=True)
class Planned:
    """What was decided and predicted for a step, and what it reads.

    Args:
        ids: the R requests that decode in it.
        num_drafts: ``[R]`` drafts that were at hand.
        made: by what verify lengths were chosen; None without drafts.
        context_tokens: tokens that the R requests attend to.
        positions: drafted at its end.
        reason: why so many.
        overhead: seconds outside the worker before it; None if the engine idled.
        built: when, on the machine's monotonic clock.
    """

    ids: tuple[str, ...]
    num_drafts: np.ndarray
    made: Prediction | None
    context_tokens: int
    positions: int
    reason: Reason
    overhead: float | None
    built: float

"""One step of a simulated server: what was built, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field

import _bench_common  # noqa: F401  (makes the package importable)
import numpy as np
from _sim_load import Request
from numpy.typing import NDArray

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.schedule.facts import Batch, DraftPlan

Ints = NDArray[np.int64]


@dataclass
class Step:
    """A step that was built.

    Args:
        decoding: the requests that have decoded so far, R of them.
        plan: of drafting at its end.
        batch: what the controller was told; None without one.
        made: what it predicted.
        lens: ``[R]`` drafts verified; taking_part: ``[R]`` bool, False where the token
            budget had nothing left for a request.
        prompts: requests and the tokens of their prompts.
    """

    decoding: list[Request]
    plan: DraftPlan
    batch: Batch | None
    made: Prediction | None
    lens: Ints
    taking_part: NDArray[np.bool_]
    prompts: list[tuple[Request, int]] = field(default_factory=list)

    @property
    def rows(self) -> list[int]:
        return np.flatnonzero(self.taking_part).tolist()

    @property
    def prefill(self) -> int:
        return sum(tokens for _, tokens in self.prompts)

    @property
    def tokens(self) -> int:
        """B."""
        return int(self.taking_part.sum() + self.lens.sum()) + self.prefill

    @property
    def emitting(self) -> list[Request]:
        """Requests that it gives tokens to."""
        done = [request for request, tokens in self.prompts if request.prompt == tokens]
        return [self.decoding[i] for i in self.rows] + done

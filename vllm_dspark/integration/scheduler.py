"""The scheduler's side: confidences arrive with the drafts and are kept per request.

Verification is still of fixed length here; trimming it by these confidences is what
the table is kept for.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput


@dataclass
class DSparkDraftTokenIds(DraftTokenIds):
    """Drafts with their confidences; pickled from the worker to the scheduler.

    Shape: confidences [num_reqs, K] float32 (rows as ``req_ids``), or None without a
    confidence head.
    """

    confidences: np.ndarray | None = field(default=None)


def give_drafts(output: ModelRunnerOutput, drafts: DraftTokenIds | None) -> None:
    """Let the drafts of a step travel with its output (see ``executor``)."""
    output.dspark_drafts = drafts  # type: ignore[attr-defined]


def take_drafts(output: ModelRunnerOutput) -> DraftTokenIds | None:
    """The drafts that travelled with an output, if any did."""
    drafts: DraftTokenIds | None = getattr(output, "dspark_drafts", None)
    return drafts


class DSparkScheduler(Scheduler):
    """vLLM's synchronous scheduler plus the confidences of the drafts in flight."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # c_1..c_K of the drafts a request will verify next, by request id.
        self.draft_confidences: dict[str, np.ndarray] = {}

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        drafts = take_drafts(model_runner_output)
        if drafts is not None:
            self.update_draft_token_ids(drafts)
        return outputs

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        confidences = getattr(draft_token_ids, "confidences", None)
        self.draft_confidences = {}
        if confidences is None:
            return
        for req_id, row in zip(draft_token_ids.req_ids, confidences, strict=True):
            request = self.requests.get(req_id)
            if request is not None and request.spec_token_ids:
                # Structured output may have cut the drafts; the prefix stays valid.
                self.draft_confidences[req_id] = row[: len(request.spec_token_ids)]

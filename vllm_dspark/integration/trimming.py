"""Trims drafts when a step is built, by their own confidences.

For schedulers that wait for the drafts: what trimming frees is there for others in the
same step.
"""

from __future__ import annotations

import numpy as np
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request

from vllm_dspark.calibration.online import Prediction
from vllm_dspark.integration.report import DeviceBudget
from vllm_dspark.integration.steering import Steering
from vllm_dspark.schedule.facts import Batch, DraftPlan


class HostTrimming(Steering):
    """``draft_confidences`` are of the drafts that will be verified next."""

    def _decide(
        self, requests: list[Request], batch: Batch, choice: DraftPlan
    ) -> tuple[Prediction | None, DeviceBudget | None]:
        plan, made = self.controller.verify(batch, choice.positions)
        for request, length in zip(requests, plan.verify_lens.tolist(), strict=True):
            if length < len(request.spec_token_ids):
                request.spec_token_ids = request.spec_token_ids[:length]
        return made, None

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        super().update_draft_token_ids(draft_token_ids)
        ids = draft_token_ids.req_ids
        self._keep_forbidden(draft_token_ids)
        self._without_skipped(ids)
        confidences = getattr(draft_token_ids, "confidences", None)
        self.draft_confidences: dict[str, np.ndarray] = {}
        if confidences is None:
            return
        for req_id, row in zip(ids, confidences, strict=True):
            request = self.requests.get(req_id)
            if request is not None and request.spec_token_ids:
                # Structured output may have cut the drafts; the prefix stays valid.
                self.draft_confidences[req_id] = row[: len(request.spec_token_ids)]

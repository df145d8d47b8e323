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
        # Structured output may have cut the drafts; the prefix stays valid.
        lengths = {
            req_id: len(request.spec_token_ids)
            for req_id in ids
            if (request := self.requests.get(req_id)) is not None
            and request.spec_token_ids
        }

        def by_request(name: str) -> dict[str, np.ndarray]:
            rows = getattr(draft_token_ids, name, None)
            if rows is None:
                return {}
            pairs = zip(ids, rows, strict=True)
            return {i: row[: lengths[i]] for i, row in pairs if i in lengths}

        self.draft_confidences = by_request("confidences")
        self.draft_certainties = by_request("certainties")

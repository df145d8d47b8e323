"""Trims drafts on the device: a budget from the scheduler, vLLM's layout of the batch.

vLLM's manager finds the budget itself, by raw confidences and cost tables fixed
at start. Ours is told it with the step; the best calibrated survivals get it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.async_utils import async_copy_to_np
from vllm.v1.worker.gpu.spec_decode.adaptive_verification import (
    AdaptiveVerificationManager,
)

from vllm_dspark.integration.report import DeviceBudget
from vllm_dspark.integration.v2.ranking import best, maps_for, survivals


class DSparkV2Verification(AdaptiveVerificationManager):
    """vLLM's manager by the controller's budgets.

    A step without a budget (vLLM's own, in warming up) is verified in full.
    """

    def __init__(self, *args: Any, **keys: Any) -> None:
        super().__init__(*args, **keys)
        self._budget: DeviceBudget | None = None
        self._lens: tuple[list[str], np.ndarray] | None = None

    # ---- told by the worker ----

    def expect(self, budget: DeviceBudget | None) -> None:
        """The budget of the step that comes."""
        self._budget, self._lens = budget, None

    def take_lens(self) -> tuple[list[str], np.ndarray] | None:
        """Requests of the step and the drafts verified of each; None without drafts.

        The numbers are there once the step's tokens are.
        """
        lens, self._lens = self._lens, None
        return lens

    # ---- overridden ----

    def add_request(self, req_idx: int) -> None:
        """A request has a slot."""
        self._confidence_probs[req_idx].fill_(1.0)

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """None: what steps cost the scheduler knows (`costs`)."""
        return iter(())

    def set_initial_cost_curves(self, samples: Any) -> None:
        """Nothing, as nothing was profiled."""

    def record_confidences(
        self, confidence_probs: torch.Tensor, input_batch: Any
    ) -> None:
        """Keep them for the ranking; the meter copies them to the host."""
        rows = confidence_probs[: input_batch.num_reqs]
        self._confidence_probs[input_batch.idx_mapping] = rows

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """Tokens of the step within its budget."""
        drafts = {r: len(draft_tokens.get(r, ())) for r in num_tokens_per_req}
        others = {r: n - drafts[r] for r, n in num_tokens_per_req.items()}
        count = self._count(drafts)
        self._batch_budget = (drafts, others, count)
        return sum(others.values()) + count

    def _count(self, drafts: dict[str, int]) -> int:
        room = max(0, self._max_total_logits - len(drafts) * self.num_bonus_tokens)
        budget = self._budget
        if budget is None:
            return min(sum(drafts.values()), room)
        reserved = zip(budget.ids, budget.reserved.tolist(), strict=True)
        first = sum(min(n, drafts.get(req_id, 0)) for req_id, n in reserved)
        known = sum(drafts.get(req_id, 0) for req_id in budget.ids)
        return min(known, room, first + budget.drafts)

    def reallocate_drafts(
        self, req_ids: list[str], idx_mapping: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Choose the drafts, and lay out logits and queries accordingly.

        Returns:
            Where each request's logits begin ``[R + 1]``, its queries (vLLM's buffer),
            and the number of drafts.
        """
        assert self._batch_budget is not None
        (drafts, others, count), self._batch_budget = self._batch_budget, None
        n = len(req_ids)
        scheduled = np.array([drafts[r] for r in req_ids], dtype=np.int32)
        lens = self._batch_draft_capacity[:n]
        async_tensor_h2d(scheduled, out=lens)
        if count == 0:
            lens.zero_()
        elif count < int(scheduled.sum()):
            lens.copy_(self._best(req_ids, idx_mapping, lens, count))
        self._lens = (req_ids, async_copy_to_np(lens))
        base = self._num_non_draft_tokens[:n]
        async_tensor_h2d(np.array([others[r] for r in req_ids], np.int32), out=base)
        logits, queries = self._cu_num_logits[: n + 1], self.query_start_loc
        _starts(logits, lens + self.num_bonus_tokens)
        _starts(queries[: n + 1], lens + base)
        queries[n + 1 :].fill_(sum(others.values()) + count)
        return logits, queries, count

    def _best(
        self,
        req_ids: list[str],
        idx_mapping: torch.Tensor,
        num_drafts: torch.Tensor,
        count: int,
    ) -> torch.Tensor:
        device, budget = num_drafts.device, self._budget
        reserved, maps, limit = torch.zeros_like(num_drafts), None, 0.0
        if budget is not None:
            # vLLM pads a prompt's last token with drafts that nobody made.
            known = set(budget.ids)
            real = np.array([r in known for r in req_ids], np.int32)
            num_drafts = num_drafts * async_tensor_h2d(real, device=device)
            own = dict(zip(budget.ids, budget.reserved.tolist(), strict=True))
            if any(own.values()):
                values = [own.get(r, 0) for r in req_ids]
                async_tensor_h2d(np.array(values, np.int32), out=reserved)
            if budget.maps is not None:
                limit = budget.maps.limit
                packed = maps_for(budget.maps, budget.ids, req_ids)
                maps = async_tensor_h2d(packed, device=device)
        survival = survivals(self._confidence_probs[idx_mapping], maps, limit)
        return best(survival, num_drafts, reserved, count)


def _starts(out: torch.Tensor, lengths: torch.Tensor) -> None:
    """0 and the running sums of lengths."""
    out[:1].zero_()
    torch.cumsum(lengths, dim=0, out=out[1:])

"""Adapters of verified rows: vLLM's V2 runner maps one logits row of each request.

With drafts a request has a row for each of them as well, and vLLM's mapping is too
short: its CPU kernels refuse it, its GPU kernels read on in what an earlier step left,
which an adapter of the LM head would feel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.core.sched.output import SchedulerOutput


class LoraRows:
    """Repeats a request's adapter for all of its rows."""

    def __init__(self, state: Any) -> None:
        """Args: state: the runner's ``LoraState``, which is changed."""
        self._rows: dict[str, int] = {}
        self._make = state.make_lora_inputs
        state.make_lora_inputs = self._inputs

    def step(self, step: SchedulerOutput) -> None:
        """The step that comes."""
        drafts = step.scheduled_spec_decode_tokens
        self._rows = {req_id: 1 + len(tokens) for req_id, tokens in drafts.items()}

    def _inputs(self, req_ids: list[str], *arguments: Any) -> tuple[Any, ...]:
        requests, tokens, active = self._make(req_ids, *arguments)
        rows = [self._rows.get(req_id, 1) for req_id in req_ids]
        return tuple(np.repeat(requests, rows).tolist()), tokens, active

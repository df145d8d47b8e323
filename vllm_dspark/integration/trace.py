"""A file with every decoding round, for those who want to see the confidences.

``additional_config={"dspark": {"trace": FILE}}`` appends one JSON line per round of a
request: ``request`` (vLLM's id), ``position`` and ``anchor`` (the last known token),
``drafts`` (those verified, possibly cut by structured output; none when the drafter
had no room or its logits were not finite), ``accepted`` (how many of them),
``confidences`` (c_1..c_ℓ) and ``certainties`` (z_1..z_ℓ; both empty without a
confidence head) and ``temperature``. A round of an aborted request is there if it ran.
The round that ends a text counts in full, also what lies past the end.

Lines are written in whole blocks: at the latest in the step after a request has ended,
which a server always makes, and when the engine shuts down.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.v1.sample.rejection_sampler import PLACEHOLDER_TOKEN_ID

from vllm_dspark.integration.json_lines import JsonLines
from vllm_dspark.integration.pending import PendingDrafts


class Trace:
    """Appends rounds to a file; trouble with it is said once and ends it.

    Args:
        path: the file; created, or appended to (several processes may share it).

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self._lines = JsonLines(path, "trace")

    def step(
        self,
        batch: Any,
        requests: dict[str, Any],
        decoding: np.ndarray,
        counts: list[int],
        draft_ids: torch.Tensor | None,
        sampled: torch.Tensor,
        pending: PendingDrafts,
    ) -> None:
        """Note the rounds of a step that has just been sampled.

        Args:
            batch: vLLM's input batch, not yet updated with the new tokens.
            requests: states of the requests, by id.
            decoding: [R] bool, False for requests whose prompt is being processed.
            counts: [R] drafts verified per request.
            draft_ids: [sum of counts] those drafts; None when there are none.
            sampled: [R, L+1] tokens that came out, padded with -1.
            pending: where their confidences are.
        """
        drafts = [] if draft_ids is None else draft_ids.tolist()
        emitted = (sampled.cpu().numpy() != PLACEHOLDER_TOKEN_ID).sum(axis=1)
        start = 0
        for row, req_id in enumerate(batch.req_ids):
            n = counts[row]
            mine, start = drafts[start : start + n], start + n
            if not decoding[row]:
                continue
            position = int(batch.num_tokens_no_spec[row]) - 1
            confidence, certainty = pending.signals(req_id, n)
            self._lines.add(
                request=req_id,
                position=position,
                anchor=int(batch.token_ids_cpu[row, position]),
                drafts=mine,
                accepted=int(emitted[row]) - 1,
                confidences=confidence,
                certainties=certainty,
                temperature=requests[req_id].sampling_params.temperature,
            )

    def flush(self) -> None:
        """Write what is kept."""
        self._lines.flush()

"""What a scheduler of vLLM's is about to do, in the controller's words."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.request import Request

from vllm_dspark.schedule.facts import Batch


def decodes(request: Request) -> bool:
    """Whether all that is known of it but the last token is in the K/V cache.

    Tokens that are still being computed (async scheduling) count as known.
    """
    known = request.num_tokens + request.num_output_placeholders
    return int(known - request.num_computed_tokens) == 1


def batch_of(
    scheduler: Any,
    requests: list[Request],
    confidences: dict[str, np.ndarray],
    certainties: dict[str, np.ndarray],
    slo_tps: float,
) -> Batch:
    """The step that a scheduler would build now.

    Args:
        scheduler: vLLM's.
        requests: those that decode.
        confidences: raw c_1.. by request, as far as they are known.
        certainties: z_1.. by request, likewise.
        slo_tps: the goal of requests that name none.
    """
    num_drafts = np.array([len(r.spec_token_ids) for r in requests], dtype=np.int64)
    ids = tuple(r.request_id for r in requests)
    width = int(num_drafts.max(initial=0))
    return Batch(
        ids,
        tuple(temperature(r) for r in requests),
        num_drafts,
        filled([confidences.get(i) for i in ids], width),
        prefill_tokens(scheduler, len(requests)),
        sum(r.num_computed_tokens for r in requests),
        np.array([_goal(r, slo_tps) for r in requests], dtype=np.float64),
        filled([certainties.get(i) for i in ids], width),
    )


def filled(rows: list[np.ndarray | None], width: int) -> np.ndarray | None:
    """Rows ``[R, width]`` with NaN where there is nothing; None if there is nothing."""
    if not width or all(row is None for row in rows):
        return None
    values = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        if row is not None:
            values[i, : len(row[:width])] = row[:width]
    return values


def prefill_tokens(scheduler: Any, decoding: int) -> int:
    """Prompt tokens that the step will hold, as far as its budget goes."""
    wanted = sum(
        max(0, r.num_tokens - r.num_computed_tokens)
        for r in scheduler.running
        if not decodes(r)
    )
    places = scheduler.max_num_running_reqs - len(scheduler.running)
    for request in scheduler.waiting:
        if places <= 0:
            break
        wanted += request.num_tokens - request.num_computed_tokens
        places -= 1
    return max(0, min(wanted, scheduler.max_num_scheduled_tokens - decoding))


def temperature(request: Request) -> float:
    """Of its sampling; 0 is greedy."""
    params = request.sampling_params
    return 0.0 if params is None else float(params.temperature)


def _goal(request: Request, everyone: float) -> float:
    params = request.sampling_params
    extra = params.extra_args if params is not None else None
    # Checked when the request came (`config.check_request`).
    return float((extra or {}).get("slo_tps", everyone))

"""Drafts that leave a grammar: the first such draft of a block is verified as well.

vLLM cuts a block before the draft x_k that the grammar forbids. The round's last token
is then drawn from p, where x_k's certain rejection would draw it from (p - q)+: biased,
since whether x_k was verified has depended on x_k (`schedule.planner`). So x_k stays as
the last of its block. One-hot q, and greedy requests, are right with the cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

PADDING = -1  # vLLM's placeholder among drafts


def keep_forbidden(request: Request, drafts: Sequence[int]) -> None:
    """Give back the draft before which vLLM has just cut a block, if it did.

    Args:
        request: its ``spec_token_ids`` are the prefix that the grammar allows.
        drafts: the whole block, drawn from a distribution.
    """
    if not request.use_structured_output or request.is_prefill_chunk:
        return
    params, left = request.sampling_params, len(request.spec_token_ids)
    if left < len(drafts) and params is not None and params.temperature > 0:
        request.spec_token_ids = list(drafts[: left + 1])


def without_forbidden(
    step: SchedulerOutput, requests: Mapping[str, Request], grammars: Any
) -> SchedulerOutput:
    """The step as the bitmask's maker may see it: it reports forbidden drafts as bugs.

    A placeholder in their place leaves the row that rejects them masked. What follows
    them is not, and is never read.

    Args:
        step: as built.
        requests: by id.
        grammars: vLLM's ``structured_output_manager``.
    """
    drafts = dict(step.scheduled_spec_decode_tokens)
    for req_id, tokens in drafts.items():
        request = requests.get(req_id)
        if request is not None and request.use_structured_output:
            good = grammars.validate_tokens(request, tokens)
            drafts[req_id] = [*good, *[PADDING] * (len(tokens) - len(good))]
    return replace(step, scheduled_spec_decode_tokens=drafts)

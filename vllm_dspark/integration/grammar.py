"""Drafts that leave a grammar: the first such draft of a block is verified as well.

vLLM cuts a block before the draft x_k that the grammar forbids. The round's last token
is then drawn from p, where x_k's certain rejection would draw it from (p - q)+: biased,
since whether x_k was verified has depended on x_k (`schedule.planner`). So x_k stays as
the last of its block. One-hot q, and greedy requests, are right with the cut.

vLLM's V2 runner leaves such drafts in their blocks where steps overlap, but ends the
verification before them, with the same bias.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.request import Request

PADDING = -1  # vLLM's placeholder among drafts
EVERYTHING = -1  # 32 tokens of a bitmask row, all allowed


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


def verify_first_forbidden(
    made: GrammarOutput,
    step: SchedulerOutput,
    requests: Mapping[str, Request],
) -> None:
    """Let the V2 runner verify the first draft that a grammar forbids, too.

    It takes a draft that is not acceptable for none at all, and draws from p in its
    place. Its own row is masked, so that it is rejected for certain. Where the draft is
    not known, or its row allows everything (no grammar rules there yet), a later row
    might be reached that nobody has masked: that stays as vLLM has it.

    Args:
        made: rows for all drafts of a request and one more; changed in place.
        step: what they are for, as built.
        requests: by id.
    """
    good, row = made.num_acceptable_drafts, 0
    assert good is not None
    validated = step.num_invalid_spec_tokens or {}  # where steps overlap
    for i, req_id in enumerate(made.structured_output_request_ids):
        drafts = step.scheduled_spec_decode_tokens.get(req_id, ())
        params, first = requests[req_id].sampling_params, good[i]
        if first < len(drafts) and params is not None and params.temperature > 0:
            known = drafts[first] != PADDING or req_id in validated
            if known and (made.grammar_bitmask[row + first] != EVERYTHING).any():
                good[i] = first + 1
        row += len(drafts) + 1

"""vLLM's thinking budget for every row that is verified.

vLLM 0.32 counts in its own speculative mode too late or too early where a block opens
a thought or spends the budget in its middle, so that the text depends on the drafts
(tests/integration/test_thinking_budget.py). Here vLLM's counting without speculation is
replayed token by token: over the tokens a request has, which is kept, and from there
over its drafts, which is thrown away. Every row then gets what plain decoding would do
after the same tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

# The request's plain state and the outputs it has seen, kept in vLLM's own entry for
# the request, which vLLM moves and drops with it.
_REPLAYED = "vllm_dspark_replayed"


def is_tracked(holder: Any) -> bool:
    """Whether any request of the batch has a thinking budget."""
    return holder is not None and holder.has_tracked_requests()


def apply(
    logits: torch.Tensor,
    holder: Any,
    starts: list[int],
    drafts: list[list[int]],
    outputs: list[list[int]],
) -> None:
    """Force the end of thinking in the rows where a budget is spent.

    Args:
        logits: [rows, V], changed in place.
        holder: vLLM's ``ThinkingBudgetStateHolder``; only we may update it.
        starts: first row of each request.
        drafts: draft tokens of each request: it has one row more than drafts.
        outputs: output tokens of each request before the drafts.
    """
    plain = copy.copy(holder)
    plain.in_spec_mode = False
    for request, entry in holder._state.items():
        state = _catch_up(plain, entry, outputs[request])
        row, history = starts[request], list(outputs[request])
        _force(plain, state, logits[row : row + 1])
        for draft in drafts[request]:
            row += 1
            history.append(draft)
            state = _step(plain, state, history)
            _force(plain, state, logits[row : row + 1])


def _catch_up(plain: Any, entry: dict[str, Any], output: list[int]) -> dict[str, Any]:
    """The plain state once it has seen all of ``output``, one token at a time."""
    # An entry that nobody has updated is the state at the start of the request.
    state, seen = entry.get(_REPLAYED, (entry, -1))
    for length in range(seen + 1, len(output) + 1):
        state = _step(plain, state, output[:length])
    entry[_REPLAYED] = (state, len(output))
    return state


def _step(plain: Any, state: dict[str, Any], history: list[int]) -> dict[str, Any]:
    """The state after one more token; vLLM replaces values, never changes them."""
    state = {name: value for name, value in state.items() if name != _REPLAYED}
    plain._state = {0: state}
    plain.update_state([history], None)
    return state


def _force(plain: Any, state: dict[str, Any], row: torch.Tensor) -> None:
    plain._state = {0: state}
    plain.apply_to_logits(row, False, None)

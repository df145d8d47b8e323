"""A drafter with an LM head of its own: vLLM alone takes none without one."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from vllm_dspark.model.checkpoint import (
    LM_HEAD,
    check_checkpoint,
    load_state,
    read_config,
    save_checkpoint,
)
from vllm_dspark.model.headers import read_headers
from vllm_dspark.model.vocab_maps import draft_to_target_ids

_EMBEDDINGS = "model.embed_tokens.weight"


def with_lm_head(drafter: Path, target: Path, out: Path) -> Path:
    """The drafter itself, or one in `out` with the target's rows as its LM head.

    A calibration stays behind: it is of the weights without that head.

    Raises:
        ValueError: the target's files have no head and no embeddings.
    """
    if check_checkpoint(drafter).has_lm_head:
        return drafter
    state = load_state(drafter)
    rows = _head(target)
    if "d2t" in state:
        rows = rows[draft_to_target_ids(state["d2t"])]
    whole = {**state, LM_HEAD: rows.to(state["fc.weight"].dtype)}
    save_checkpoint(out, read_config(drafter), whole)
    return out


def _head(target: Path) -> Tensor:
    """``[V, d]``; tied to the embeddings where there is none in the files."""
    headers = read_headers(target)
    for name in (LM_HEAD, _EMBEDDINGS):
        if name in headers:
            with safe_open(headers[name].file, "pt") as tensors:
                return tensors.get_tensor(name)
    raise ValueError(f"{target} has neither {LM_HEAD!r} nor {_EMBEDDINGS!r}")

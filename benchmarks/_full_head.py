"""A drafter with an LM head of its own: vLLM alone takes none without one."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vllm_dspark.model.checkpoint import LM_HEAD, check_checkpoint, load_state
from vllm_dspark.model.vocab_maps import draft_to_target_ids

_EMBEDDINGS = "model.embed_tokens.weight"


def with_lm_head(drafter: Path, target: Path, out: Path) -> Path:
    """The drafter itself, or a copy in `out` with the target's rows as its LM head.

    Raises:
        ValueError: the target's files have no head and no embeddings.
    """
    if check_checkpoint(drafter).has_lm_head:
        return drafter
    state = load_state(drafter)
    rows = _head(target)
    if "d2t" in state:
        rows = rows[draft_to_target_ids(state["d2t"]).long()]
    out.mkdir(parents=True, exist_ok=True)
    for file in drafter.glob("*.json"):
        if not file.name.endswith(".index.json"):  # all is in one file here
            shutil.copy(file, out)
    dtype = state["fc.weight"].dtype
    whole = {**state, LM_HEAD: rows.to(dtype).contiguous()}
    save_file(whole, out / "model.safetensors")
    return out


def _head(target: Path) -> Tensor:
    """``[V, d]``; tied to the embeddings where there is none in the files."""
    for name in (LM_HEAD, _EMBEDDINGS):
        for file in sorted(target.glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118
                    return tensors.get_tensor(name)
    raise ValueError(f"{target} has neither {LM_HEAD!r} nor {_EMBEDDINGS!r}")

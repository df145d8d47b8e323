"""The maps between a reduced draft vocabulary and the target's: ``d2t`` and ``t2d``.

``d2t`` ``[Vd]`` is what to add to a draft id to get the target's id. The speculators
library also writes ``t2d`` ``[V]``, true for the target's tokens that have a draft id;
it counts draft ids along it, so there they are in the order of the target's ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_dspark.model.headers import TensorHeader

D2T = "d2t"
T2D = "t2d"


def draft_to_target_ids(offsets: Tensor) -> Tensor:
    """Target ids ``[Vd]`` int64 of the draft ids, from the offsets in ``d2t``."""
    return torch.arange(len(offsets)) + offsets.long()


def target_map(offsets: Tensor, vocab_size: int) -> Tensor:
    """``t2d`` ``[V]`` bool of the offsets in ``d2t`` ``[Vd]``."""
    mapping = torch.zeros(vocab_size, dtype=torch.bool)
    mapping[draft_to_target_ids(offsets)] = True
    return mapping


def check_offsets(offsets: Tensor, vocab_size: int, source: str) -> None:
    """Refuse a ``d2t`` that is no map into the vocabulary.

    Args:
        offsets: ``d2t`` ``[Vd]``.
        vocab_size: V.
        source: the file it came from, for messages.

    Raises:
        ValueError: it leaves the vocabulary or names a token twice.
    """
    ids = draft_to_target_ids(offsets)
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"{source}: 'd2t' leads to token {low if low < 0 else high}, outside the "
            f"vocabulary of {vocab_size}; it holds offsets (target id minus "
            "draft id)"
        )
    if len(set(ids.tolist())) != len(ids):
        raise ValueError(
            f"{source}: 'd2t' leads two draft ids to one token; it holds offsets "
            "(target id minus draft id), each token at most once"
        )


def check_target_map(
    offsets: Tensor, mapping: Tensor | None, vocab_size: int, source: str
) -> None:
    """Refuse maps that the speculators library would misread.

    Args:
        offsets: ``d2t`` ``[Vd]`` that `check_offsets` accepts.
        mapping: ``t2d`` ``[V]``, None if the folder has none.
        vocab_size: V.
        source: the file they came from, for messages.

    Raises:
        ValueError: draft ids are not in the order of their target ids, or the two
            maps name different tokens.
    """
    if bool((draft_to_target_ids(offsets).diff() < 0).any()):
        raise ValueError(
            f"{source}: 'd2t' is not in the order of the target's ids, which the "
            "speculators layout cannot express ('t2d' only says which tokens have a "
            "draft id); sort the draft vocabulary"
        )
    if mapping is None or torch.equal(mapping, target_map(offsets, vocab_size)):
        return
    raise ValueError(
        f"{source}: 't2d' and 'd2t' name different tokens; the folder is broken"
    )


def check_target_map_header(header: TensorHeader, vocab_size: int | None) -> None:
    """Check ``t2d`` before it is read.

    Args:
        header: of ``t2d``.
        vocab_size: V; None where the folder should have no such tensor.

    Raises:
        ValueError: it should not be there, or has another shape or dtype.
    """
    if vocab_size is None:
        raise ValueError(
            f"{header.file}: unexpected {T2D!r} in the weights; only speculators "
            "folders with a reduced vocabulary have it"
        )
    if header.dtype != "BOOL" or header.shape != (vocab_size,):
        raise ValueError(
            f"{header.file}: {T2D!r} is {header.dtype} of shape {list(header.shape)}; "
            f"expected BOOL and [{vocab_size}]"
        )

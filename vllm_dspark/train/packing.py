"""The blocks of several sequences in one pass, for GPUs (3.3).

A GPU wants few and large products. Each sequence keeps its own context, padded behind
its end where no block looks; the blocks of a sequence lie side by side, padded to the
same number; rows of the padding are left out of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence as Texts

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vllm_dspark.train.blocks import Blocks, positions_of, target_probs
from vllm_dspark.train.data import Sequence
from vllm_dspark.train.features import Features


def pack_sequences(
    sequences: Texts[Sequence],
    features: Texts[Features],
    block_size: int,
    target_to_draft: Tensor | None,
) -> tuple[Tensor, Blocks]:
    """What `SequenceLoss` takes for all sequences at once.

    Args:
        sequences: C of them, each with an anchor.
        features: of the same sequences, on one device.
        block_size: K.
        target_to_draft: as `build_blocks`, on that device.

    Returns:
        hidden states ``[C, T, m·d]`` and C·n blocks, n of each sequence.
    """
    device = features[0].hidden.device
    most = max(len(s.anchors) for s in sequences)
    context = max(int(s.anchors.max()) for s in sequences)
    anchors = np.zeros((len(sequences), most), np.int64)
    prev_ids = np.zeros((len(sequences), most, block_size), np.int64)
    valid = np.zeros_like(prev_ids, dtype=bool)
    target_row = np.zeros_like(prev_ids)
    offset = 0
    for c, (sequence, known) in enumerate(zip(sequences, features, strict=True)):
        n = len(sequence.anchors)
        anchors[c, :n] = sequence.anchors
        length = len(sequence.tokens)
        at, valid[c, :n] = positions_of(sequence.anchors, length, block_size)
        prev_ids[c, :n] = sequence.tokens.numpy()[at]
        target_row[c, :n] = offset + at - known.first
        offset += len(known.top_ids)
    counted = np.flatnonzero(valid)

    def moved(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(device, non_blocking=True)

    targets = target_probs(
        torch.cat([f.top_ids for f in features]),
        torch.cat([f.top_probs for f in features]),
        moved(target_row.reshape(-1)[counted]),
        target_to_draft,
    )
    blocks = Blocks(
        moved(anchors.reshape(-1)),
        moved(prev_ids.reshape(-1, block_size)),
        moved(valid.reshape(-1, block_size)),
        targets,
        context,
        moved(counted),
    )
    hidden = pad_sequence([f.hidden[:context] for f in features], batch_first=True)
    return hidden, blocks

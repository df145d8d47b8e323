"""The target's LM head lends its rows where it lies, which need not be the CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

V, D = 10, 4


def target(weight: torch.Tensor) -> Any:
    shard = SimpleNamespace(org_vocab_start_index=0, org_vocab_end_index=V)
    head = SimpleNamespace(weight=weight, shard_indices=shard, org_vocab_size=V)
    return SimpleNamespace(lm_head=head)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_rows_of_ids_on_the_cpu(device: str) -> None:
    from vllm_dspark.integration.model import target_lm_head_rows

    weight = torch.arange(V * D, dtype=torch.bfloat16).view(V, D)
    rows = target_lm_head_rows(target(weight.to(device)), torch.tensor([7, 0, 9]))
    assert (rows.shape, rows.dtype, rows.device.type) == ((3, D), weight.dtype, device)
    if device == "cpu":
        assert torch.equal(rows, weight[[7, 0, 9]])

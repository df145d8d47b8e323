"""The parallel stage against loops, against Hugging Face's layer, and its context.

Regimes: grouped heads with and without biases; full attention (the block sees itself
both ways) and sliding windows shorter than the context and than the block; requests of
different lengths in one padded batch; one context shared by several anchors; stale
rows at and after the anchor, as a rejection leaves them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3Model

from tests.model.reference import ReferenceBackbone
from tests.tiny import make_tiny_drafter
from vllm_dspark.model.backbone import ContextKV
from vllm_dspark.model.checkpoint import load_drafter, load_state
from vllm_dspark.model.drafter import Drafter

VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "bias": {"overrides": {"attention_bias": True}},
    "sliding": {"sliding_window": 4},
    "sliding-in-block": {"sliding_window": 2},
    "one-layer": {"num_layers": 1},
    "reduced": {"draft_vocab_size": 40},
}
# float32 against float64 over two layers: rounding stays below a few 1e-6.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(params=VARIANTS)
def folder(request: Any, tmp_path: Path, tiny_target: Path) -> Path:
    variant = VARIANTS[request.param]
    # noise=1 keeps the final norm near 1, so that errors are not scaled away.
    return make_tiny_drafter(
        tmp_path, tiny_target, own_embeddings=True, noise=1.0, **variant
    )


def features(drafter: Drafter, *shape: int, seed: int = 5) -> Tensor:
    """Random target features ``[*shape, m*d]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((*shape, drafter.config.feature_size), generator=generator)


def padded_context(drafter: Drafter, rows: list[Tensor]) -> ContextKV:
    """Context of several requests, rows ``[T_r, m*d]``, padded with garbage."""
    longest = max(len(row) for row in rows)
    batch = torch.full((len(rows), longest, drafter.config.feature_size), 7.0)
    positions = torch.full((len(rows), longest), -1)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
        positions[i, : len(row)] = torch.arange(len(row))
    return drafter.context_kv(batch, positions)


def test_equals_the_loops(folder: Path) -> None:
    drafter = load_drafter(folder)
    reference = ReferenceBackbone(drafter.config, load_state(folder))
    rows = [features(drafter, n, seed=n) for n in (1, 3, 9)]
    anchors = torch.tensor([4, 60, 127])
    positions = torch.tensor([len(row) for row in rows])
    context = padded_context(drafter, rows)
    for size in (1, 3, 5):
        hidden, logits = drafter.forward_block(anchors, positions, context, size)
        expected = torch.stack(
            [
                reference.run(row, int(anchor), len(row), size)
                for row, anchor in zip(rows, anchors, strict=True)
            ]
        )
        torch.testing.assert_close(hidden, expected.float(), **CLOSE)
        expected = expected @ reference.state["lm_head.weight"].T
        torch.testing.assert_close(logits, expected.float(), **CLOSE)


def test_equals_hugging_face_layers_without_context(
    tmp_path: Path, tiny_target: Path
) -> None:
    """A causal drafter without context is a plain Qwen3 model of its inputs."""
    folder = make_tiny_drafter(
        tmp_path, tiny_target, own_embeddings=True, sliding_window=64, noise=1.0
    )
    drafter = load_drafter(folder)
    config = drafter.config
    model = Qwen3Model(
        Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        )
    )
    state = drafter.state_dict()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    ids = torch.tensor([[9, 0, 0, 0, 0]])
    nothing = drafter.context_kv(features(drafter, 1, 1), torch.tensor([[-1]]))
    hidden, _ = drafter.forward_block(torch.tensor([9]), torch.tensor([37]), nothing)
    with torch.no_grad():
        expected = model(ids, position_ids=torch.arange(37, 42)[None])
    torch.testing.assert_close(hidden, expected.last_hidden_state, **CLOSE)


def test_context_computed_piece_by_piece_is_the_same(folder: Path) -> None:
    drafter = load_drafter(folder)
    rows = features(drafter, 1, 12)
    positions = torch.arange(12)[None]
    whole = drafter.context_kv(rows, positions)
    for cut in (1, 5, 11):
        first = drafter.context_kv(rows[:, :cut], positions[:, :cut])
        rest = drafter.context_kv(rows[:, cut:], positions[:, cut:])
        keys = torch.cat([first.keys, rest.keys], dim=2)
        values = torch.cat([first.values, rest.values], dim=2)
        torch.testing.assert_close(keys, whole.keys)
        torch.testing.assert_close(values, whole.values)


def test_rows_at_and_after_the_anchor_are_not_seen(folder: Path) -> None:
    drafter = load_drafter(folder)
    rows = features(drafter, 1, 9)
    anchor, position = torch.tensor([11]), torch.tensor([6])
    changed = rows.clone()
    changed[:, 6:] += 3.0
    touched = rows.clone()
    touched[:, 5] += 3.0
    outputs = [
        drafter.forward_block(
            anchor, position, drafter.context_kv(x, torch.arange(9)[None])
        )[0]
        for x in (rows, changed, touched)
    ]
    assert torch.equal(outputs[0], outputs[1])
    # The last row before the anchor is seen, from the first input on.
    assert not torch.allclose(outputs[0][:, 0], outputs[2][:, 0], atol=1e-3)


def test_one_context_serves_many_anchors(folder: Path) -> None:
    drafter = load_drafter(folder)
    rows = features(drafter, 1, 10)
    anchors, positions = torch.tensor([20, 21, 22]), torch.tensor([2, 5, 9])
    shared = drafter.context_kv(rows, torch.arange(10)[None])
    together, _ = drafter.forward_block(anchors, positions, shared)
    copies = padded_context(drafter, [rows[0]] * 3)
    apart, _ = drafter.forward_block(anchors, positions, copies)
    torch.testing.assert_close(together, apart)
    # As training runs them, in the fused kernel.
    x = torch.randn(3, drafter.config.block_size, drafter.config.hidden_size)
    plain = drafter.run_block(x, positions, shared)
    packed = drafter.run_block(x, positions, shared, packed=True)
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)


def test_full_attention_is_bidirectional_and_sliding_causal(
    tmp_path: Path, tiny_target: Path
) -> None:
    """Fewer masks behind change the first hidden state only if it looks ahead."""
    changes = {}
    for window in (None, 64):
        folder = make_tiny_drafter(
            tmp_path, tiny_target, own_embeddings=True, sliding_window=window, noise=1.0
        )
        drafter = load_drafter(folder)
        context = padded_context(drafter, [features(drafter, 4)])
        anchor, position = torch.tensor([9]), torch.tensor([4])
        long, _ = drafter.forward_block(anchor, position, context, 5)
        short, _ = drafter.forward_block(anchor, position, context, 1)
        changes[window] = float((long[:, 0] - short[:, 0]).abs().max())
    assert changes[None] > 1e-3
    assert changes[64] < 1e-5

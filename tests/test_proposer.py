"""The proposer against teacher forcing: sampling left to right and scoring the result
with all previous tokens given must agree, for every head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import make_tiny_drafter
from vllm_dspark.model.backbone import ContextKV
from vllm_dspark.model.checkpoint import load_drafter
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.proposer import DraftOptions, Proposer, extend_context

VARIANTS: list[dict[str, Any]] = [
    {"head_type": "vanilla"},
    {"head_type": "gated"},
    {"head_type": "rnn", "confidence_with_markov": False},
    {"markov_rank": 0},
    {"head_type": "vanilla", "draft_vocab_size": 40},
    {"head_type": "rnn", "draft_vocab_size": 40, "confidence": False},
]
ANCHORS = torch.tensor([4, 60, 127])
POSITIONS = torch.tensor([7, 3, 9])


@pytest.fixture(params=VARIANTS, ids=str)
def drafter(request: Any, tmp_path: Path, tiny_target: Path) -> Drafter:
    folder = make_tiny_drafter(
        tmp_path, tiny_target, own_embeddings=True, noise=1.0, **request.param
    )
    return load_drafter(folder)


def context(drafter: Drafter) -> ContextKV:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn((1, 9, drafter.config.feature_size), generator=generator)
    return drafter.context_kv(rows, torch.arange(9)[None])


def teacher_forced(drafter: Drafter, drafts: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits ``[R, K, Vd]`` and confidences of the drafts' own prefixes."""
    size = drafts.shape[1]
    hidden, base = drafter.forward_block(ANCHORS, POSITIONS, context(drafter), size)
    prev = torch.cat([ANCHORS[:, None], drafts[:, :-1]], dim=1)
    logits, confidence = drafter.teacher_forced(hidden, base, prev)
    return logits, None if confidence is None else confidence.sigmoid()


def target_ids(drafter: Drafter, draft_ids: Tensor) -> Tensor:
    mapping = drafter.draft_to_target
    return draft_ids if mapping is None else mapping[draft_ids]


@pytest.mark.parametrize("num_drafts", [5, 2])
def test_greedy_drafts_are_the_teacher_forced_argmax(
    drafter: Drafter, num_drafts: int
) -> None:
    proposer = Proposer(drafter, DraftOptions(num_speculative_tokens=num_drafts))
    block = proposer.propose(ANCHORS, POSITIONS, context(drafter))
    assert block.token_ids.shape == (3, num_drafts)
    logits, confidence = teacher_forced(drafter, block.token_ids)
    assert torch.equal(block.token_ids, target_ids(drafter, logits.argmax(-1)))
    assert block.draft_probs is None
    assert bool(block.finite.all())
    if confidence is None:
        assert block.confidence is None
    else:
        torch.testing.assert_close(block.confidence, confidence)


def test_drawn_drafts_come_with_the_teacher_forced_distribution(
    drafter: Drafter,
) -> None:
    options = DraftOptions(draft_sample_method="probabilistic")
    temperature = torch.tensor([0.7, 1.0, 1.5])
    generator = torch.Generator().manual_seed(2)
    uniforms = torch.rand((3, 5), dtype=torch.float64, generator=generator)
    block = Proposer(drafter, options).propose(
        ANCHORS, POSITIONS, context(drafter), temperature, uniforms
    )
    logits, _ = teacher_forced(drafter, block.token_ids)
    expected = (logits / temperature[:, None, None]).softmax(-1)
    torch.testing.assert_close(block.draft_probs, expected, rtol=1e-4, atol=1e-6)
    if drafter.draft_to_target is not None:
        assert block.draft_support is not None
        assert block.draft_support.flatten().tolist() == (
            drafter.draft_to_target.tolist()
        )
    # By inverse CDF: the uniform falls into the drawn token's interval.
    below = expected.double().cumsum(-1)
    drawn = target_ids(drafter, (below <= uniforms[..., None]).sum(-1))
    assert torch.equal(block.token_ids, drawn)


def test_topk_draws_among_the_largest_base_logits(drafter: Drafter) -> None:
    options = DraftOptions(draft_sample_method="probabilistic", dspark_draft_topk=3)
    ones = torch.ones(3)
    uniforms = torch.full((3, 5), 0.5, dtype=torch.float64)
    block = Proposer(drafter, options).propose(
        ANCHORS, POSITIONS, context(drafter), ones, uniforms
    )
    _, base = drafter.forward_block(ANCHORS, POSITIONS, context(drafter))
    allowed = target_ids(drafter, base.topk(3).indices)
    assert bool((block.token_ids[..., None] == allowed).any(-1).all())
    assert block.draft_probs is not None
    assert block.draft_probs.shape == (3, 5, 3)


def test_method_greedy_ignores_the_temperature(drafter: Drafter) -> None:
    proposer = Proposer(drafter)
    plain = proposer.propose(ANCHORS, POSITIONS, context(drafter))
    hot = proposer.propose(
        ANCHORS,
        POSITIONS,
        context(drafter),
        torch.full((3,), 5.0),
        torch.rand((3, 5), dtype=torch.float64),
    )
    assert torch.equal(plain.token_ids, hot.token_ids)
    assert hot.draft_probs is None


def test_extended_context_is_the_whole(drafter: Drafter) -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn((1, 9, drafter.config.feature_size), generator=generator)
    grown = None
    for start, end in ((0, 4), (4, 5), (5, 9)):
        positions = torch.arange(start, end)[None]
        grown = extend_context(grown, drafter.context_kv(rows[:, start:end], positions))
    assert grown is not None
    whole = drafter.context_kv(rows, torch.arange(9)[None])
    torch.testing.assert_close(grown.keys, whole.keys)
    torch.testing.assert_close(grown.values, whole.values)
    assert torch.equal(grown.positions, whole.positions)


def test_bad_options_are_refused(drafter: Drafter) -> None:
    with pytest.raises(ValueError, match="is 6, but the drafter's block_size is 5"):
        Proposer(drafter, DraftOptions(num_speculative_tokens=6))
    with pytest.raises(ValueError, match="'random'; choose one of greedy, prob"):
        DraftOptions(draft_sample_method="random")

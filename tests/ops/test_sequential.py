"""`draft_sequential`: the reference against a naive loop, native against the reference.

Every head type is another latent; topk changes which logits exist, a reduced
vocabulary what an id means; sizes that are no multiple of 16 or 64 reach the tails of
the packed product. float32 weights: token for token. Tolerances: float32 products are
summed in another order (1e-5 of probabilities and confidences).
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.ops.sequential_cases import HEADS, Block, make_block, make_head, naive_draft
from vllm_dspark.ops import SequentialDraft, extension_native

TOPKS = (None, 1, 12, 10_000)


def assert_same(a: SequentialDraft, b: SequentialDraft) -> None:
    """Tokens, support and flags equal; numbers close."""
    assert torch.equal(a.token_ids, b.token_ids)
    assert torch.equal(a.finite, b.finite)
    for name in ("draft_support", "draft_probs", "confidence"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x is None) == (y is None), name
        if x is not None:
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    for draft in (a, b):
        nowhere = draft.confidence is None or draft.backend == "triton"
        assert (draft.certainty is None) == nowhere, draft.backend
    if a.certainty is not None and b.certainty is not None:
        # A log of what is left of 1: near the limit of 1e-4 a rounded sum shows.
        rows = a.finite, b.finite
        certainties = (a.certainty[rows[0]], b.certainty[rows[1]])
        torch.testing.assert_close(*certainties, atol=2e-3, rtol=1e-4)


@pytest.mark.parametrize("topk", TOPKS)
@pytest.mark.parametrize("draft_vocab", [None, 77])
@pytest.mark.parametrize("head_type", HEADS)
def test_reference_equals_naive(
    head_type: str, draft_vocab: int | None, topk: int | None
) -> None:
    for seed, confidence in enumerate(["none", "plain", "markov"]):
        head = make_head(
            seed, head_type, draft_vocab=draft_vocab, confidence=confidence
        )
        block = make_block(seed, head, topk=topk, masked=0.2 * seed)
        result = block.run("reference")
        assert bool(result.finite.all())
        assert result.draft_probs is not None
        for r in range(6):
            tokens, probs, confidences = naive_draft(block, r)
            assert result.token_ids[r].tolist() == tokens
            assert confidences == pytest.approx(
                [] if result.confidence is None else result.confidence[r].tolist(),
                abs=1e-6,
            )
            for k, p in enumerate(probs):
                dense = to_dense(result, r, k, 200)
                ids = head.draft_to_target
                expected = torch.zeros(200)
                expected[: len(p) if ids is None else 200] = (
                    p if ids is None else expected.index_copy(0, ids.long(), p)
                )
                torch.testing.assert_close(dense, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("topk", [None, 5])
@pytest.mark.parametrize("sampling", ["greedy", "random"])
def test_certainty_is_the_log_odds_of_the_likeliest(
    native: None, backend: str, topk: int | None, sampling: str
) -> None:
    head = make_head(5, "none", vocab=300, draft_vocab=97, confidence="plain")
    block = make_block(5, head, requests=4, topk=topk, sampling=sampling)
    block.base[1, 0] = 0.0
    block.base[1, 0, 11] = 30.0  # as good as certain
    block.base[2, 0] = 0.0  # nothing is known
    certainty = block.run(backend).certainty
    assert certainty is not None
    for r, row in enumerate(block.base.double().tolist()):
        for k, logits in enumerate(row):
            kept = sorted(logits, reverse=True)[: topk or 97]
            likeliest = 1 / sum(math.exp(x - kept[0]) for x in kept)
            odds = likeliest / max(1 - likeliest, 1e-300)
            expected = min(math.log(odds), -math.log(1e-4))
            assert float(certainty[r, k]) == pytest.approx(expected, abs=2e-3)
    assert float(certainty[1, 0]) == pytest.approx(-math.log(1e-4), abs=1e-5)
    assert float(certainty[2, 0]) == pytest.approx(
        -math.log((topk or 97) - 1), abs=1e-5
    )


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_certainty_does_not_depend_on_what_is_drawn(native: None, backend: str) -> None:
    head = make_head(6, "vanilla")
    block = make_block(6, head, requests=5, sampling="random")
    other = dataclasses.replace(
        block, options={**block.options, "uniforms": 1 - block.options["uniforms"]}
    )
    one, two = block.run(backend), other.run(backend)
    assert (one.token_ids[:, 0] != two.token_ids[:, 0]).any()
    assert one.certainty is not None and two.certainty is not None
    assert torch.equal(one.certainty[:, 0], two.certainty[:, 0])


def to_dense(result: SequentialDraft, r: int, k: int, vocab: int) -> torch.Tensor:
    """Draft distribution over the target's vocabulary."""
    assert result.draft_probs is not None
    p, support = result.draft_probs[r, k], result.draft_support
    if support is None:
        return p
    row = support.expand(result.draft_probs.shape)[r, k]
    return torch.zeros(vocab).index_add_(0, row.long(), p)


@pytest.mark.parametrize("sampling", ["greedy", "random", "mixed"])
@pytest.mark.parametrize("topk", TOPKS)
@pytest.mark.parametrize("head_type", HEADS)
def test_native_equals_reference(
    native: None, head_type: str, topk: int | None, sampling: str
) -> None:
    sizes = [(64, None, 16, 24), (1000, 333, 33, 7), (131, 130, 5, 40)]
    for seed, (vocab, draft_vocab, rank, hidden) in enumerate(sizes):
        head = make_head(
            seed,
            head_type,
            vocab=vocab,
            draft_vocab=draft_vocab,
            rank=rank,
            hidden=hidden,
        )
        for requests in (1, 2, 7, 13):
            for return_probs in (False, True):
                block = make_block(
                    seed + requests,
                    head,
                    requests=requests,
                    sampling=sampling,
                    topk=topk,
                    return_probs=return_probs,
                    masked=0.3 * seed,
                )
                assert_same(block.run("reference"), block.run("native"))


@pytest.mark.parametrize("topk", [None, 40])
@pytest.mark.parametrize("head_type", HEADS)
def test_every_instruction_set(isa: str, head_type: str, topk: int | None) -> None:
    head = make_head(1, head_type, vocab=5000, draft_vocab=2345, rank=31)
    for dtype in (torch.float32, torch.bfloat16):
        block = make_block(2, head, requests=9, topk=topk, dtype=dtype)
        assert_same(block.run("reference"), block.run("native"))


@pytest.mark.parametrize("topk", [None, 64])
@pytest.mark.parametrize("head_type", HEADS)
def test_bfloat16_weights(isa: str, head_type: str, topk: int | None) -> None:
    """Same tokens where no near-tie decides.

    A latent on the edge between two bfloat16 values may be rounded either way after
    float32 sums in another order: one part in 256 of one of `rank` terms of a logit.
    """
    head = make_head(3, head_type, vocab=600, rank=32, dtype=torch.bfloat16)
    block = make_block(4, head, requests=12, topk=topk, dtype=torch.bfloat16)
    a, b = block.run("reference"), block.run("native")
    assert torch.equal(a.finite, b.finite)
    assert a.draft_probs is not None and b.draft_probs is not None
    assert a.confidence is not None and b.confidence is not None
    agree = (a.token_ids == b.token_ids).cumprod(1).bool()
    assert agree.float().mean() > 0.95
    first = torch.cat([torch.ones(12, 1, dtype=torch.bool), agree[:, :-1]], 1)
    torch.testing.assert_close(
        a.draft_probs[first], b.draft_probs[first], atol=0.02, rtol=0.02
    )
    torch.testing.assert_close(a.confidence[first], b.confidence[first])
    assert a.certainty is not None and b.certainty is not None
    torch.testing.assert_close(
        a.certainty[first], b.certainty[first], atol=0.05, rtol=0.02
    )


@pytest.mark.parametrize("rank", [5, 32, 33, 128])
@pytest.mark.parametrize("head_type", ["vanilla", "gated", "rnn"])
def test_matrix_tiles(native: None, head_type: str, rank: int) -> None:
    """Groups of 1 to 40 requests: a part of a tile, one, two, and several groups.

    Compared with the dot products on the same bfloat16 inputs, which differ in the
    order of float32 sums only: one token, so that no near-tie is carried on.
    """
    module = extension_native.require()
    if module.set_isa("auto") != "amx":
        pytest.skip(
            "no matrix tiles: the processor, the system or the build lacks them"
        )
    size = {"vocab": 700, "draft_vocab": 517, "rank": rank, "dtype": torch.bfloat16}
    head = make_head(rank, head_type, **size)
    before, groups = module.tile_calls(), 0
    for requests in (1, 2, 3, 15, 16, 17, 31, 32, 33, 40):
        for sampling in ("greedy", "mixed"):
            block = make_block(
                requests,
                head,
                requests=requests,
                positions=1,
                sampling=sampling,
                dtype=torch.bfloat16,
            )
            assert module.set_isa("amx") == "amx"
            tiles = block.run("native")
            assert module.set_isa("avx512_bf16") == "avx512_bf16"
            assert_same(block.run("native"), tiles)
            groups += requests >= 2
    module.set_isa("auto")
    # One call a thread and position, and none where one request is faster without.
    assert module.tile_calls() - before == groups


def test_tiles_are_given_back(native: None) -> None:
    """bfloat16 products of torch's, which may run on tiles, are what they were."""
    module = extension_native.require()
    if module.set_isa("auto") != "amx":
        pytest.skip(
            "no matrix tiles: the processor, the system or the build lacks them"
        )
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 128, generator=g).bfloat16()
    head = make_head(1, "vanilla", rank=64, dtype=torch.bfloat16)
    block = make_block(1, head, requests=5, dtype=torch.bfloat16)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        expected, draft = x @ x.T, block.run("native")
        for _ in range(5):
            assert torch.equal(x @ x.T, expected)
            assert torch.equal(block.run("native").token_ids, draft.token_ids)


@pytest.mark.parametrize("topk", [None, 9])
@pytest.mark.parametrize("requests", [0, 1])
def test_sizes_of_nothing(native: None, requests: int, topk: int | None) -> None:
    for positions in (0, 1):
        block = make_block(
            1, make_head(1, "rnn"), requests=requests, positions=positions, topk=topk
        )
        a, b = block.run("reference"), block.run("native")
        assert b.token_ids.shape == (requests, positions)
        assert_same(a, b)


@pytest.mark.parametrize("topk", [None, 3])
@pytest.mark.parametrize("head_type", HEADS)
def test_one_candidate(native: None, head_type: str, topk: int | None) -> None:
    block = make_block(1, make_head(1, head_type), topk=topk, masked=1.0)
    for backend in ("reference", "native"):
        assert (block.run(backend).token_ids == 100).all()
    assert_same(block.run("reference"), block.run("native"))


@pytest.mark.parametrize("sampling", ["greedy", "random"])
@pytest.mark.parametrize("topk", [None, 12])
@pytest.mark.parametrize("head_type", HEADS)
def test_bad_numbers_are_flagged(
    isa: str, head_type: str, topk: int | None, sampling: str
) -> None:
    clean = make_block(1, make_head(1, head_type), topk=topk, sampling=sampling)
    expected = clean.run("reference")
    block = dataclasses.replace(
        clean, base=clean.base.clone(), hidden=clean.hidden.clone()
    )
    block.base[1, 2, 33] = float("nan")
    block.base[2, 4, 7] = float("inf")
    block.base[3, 0] = -float("inf")
    block.hidden[4, 3, 5] = float("nan")
    for backend in ("reference", "native"):
        result = block.run(backend)
        assert result.finite.tolist() == [True, False, False, False, False, True]
        assert ((result.token_ids >= 0) & (result.token_ids < 200)).all()
        for r in (0, 5):  # others in the batch are not disturbed
            assert torch.equal(result.token_ids[r], expected.token_ids[r])


def test_ties_take_the_lowest_id(isa: str) -> None:
    head = make_head(1, "none", vocab=300, confidence="none")
    for topk in (None, 5):
        block = make_block(1, head, topk=topk, sampling="greedy", requests=2)
        block.base.zero_()
        assert (block.run("native").token_ids == 0).all()
        block.base[:, :, [290, 131, 70]] = 1.0
        result = block.run("native")
        assert (result.token_ids == 70).all()
        if topk:
            assert result.draft_support is not None
            assert result.draft_support[0, 0].tolist() == [0, 1, 70, 131, 290]


def test_threads_and_strides_do_not_matter(native: None) -> None:
    head = make_head(5, "gated", vocab=30_000, draft_vocab=22_222)
    for topk in (None, 100):
        block = make_block(6, head, requests=5, topk=topk)
        wide = torch.full((5, 5, 22_300), float("nan"))
        wide[:, :, :22_222] = block.base
        strided = dataclasses.replace(block, base=wide[:, :, :22_222])
        expected = block.run("reference")
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert_same(expected, strided.run("native"))


def test_changed_weights_are_noticed(native: None) -> None:
    head = make_head(7, "vanilla")
    block: Block = make_block(7, head)
    before = block.run("native")
    assert head.markov_w2 is not None
    head.markov_w2.mul_(-3.0)
    assert_same(block.run("reference"), block.run("native"))
    assert not torch.equal(before.token_ids, block.run("native").token_ids)


def test_one_head_for_blocks_of_two_shapes(native: None) -> None:
    head = make_head(8, "none", confidence="none")
    for columns, width in ((200, 24), (90, 24), (200, 7)):
        block = make_block(8, head)
        block = dataclasses.replace(
            block, base=block.base[..., :columns], hidden=block.hidden[..., :width]
        )
        assert_same(block.run("reference"), block.run("native"))

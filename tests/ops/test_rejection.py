"""`rejection_sample`: the specification by hand, then native against it.

* greedy, random and mixed batches: three different control flows;
* dense, one-hot, truncated and reduced drafts: four different residuals;
* vocabularies below, at and across the kernels' blocks of 2048, odd ones for the tails;
* temperatures, -inf, bfloat16, strided rows: how a logit is read.
Backends must agree token for token: randomness comes in from outside.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.rejection_cases import INF, KINDS, Case, assert_same, make_case
from vllm_dspark.ops import rejection_sample

VOCABS = (32, 33, 1000, 2048, 2049, 32000, 49152)
METHODS = ("standard", "block")


def test_greedy_by_hand() -> None:
    logits = torch.full((5, 4), 0.0)
    for row, best in enumerate([2, 1, 3, 0, 0]):
        logits[row, best] = 5.0
    # Request 0: drafts 2 (right), 0 (wrong: 1); request 1: no draft, its bonus row 0;
    # row 2 of request 0 is never reached.
    result = rejection_sample(
        logits[:4], torch.tensor([2, 0]), torch.tensor([2, 0]), backend="reference"
    )
    assert result.token_ids.tolist() == [[2, 1, -1], [0, -1, -1]]
    assert result.num_emitted.tolist() == [2, 1]
    assert result.token_ids.dtype == result.num_emitted.dtype == torch.int32


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("draft", "accept", "sample", "emitted"),
    [
        # p = (.5, .3, .2), q = (.2, .6, .2): token 1 is accepted with probability 1/2.
        (1, 0.49, 0.0, [1, 2]),
        (1, 0.51, 0.0, [0, -1]),
        (1, 0.51, 0.999, [0, -1]),  # the residual is token 0 alone
        (0, 0.999, 0.0, [0, 2]),  # p > q: always
        (7, 0.0, 0.0, [0, -1]),  # no such token
        (-1, 0.0, 0.0, [0, -1]),
    ],
)
def test_random_by_hand(
    backend: str, draft: int, accept: float, sample: float, emitted: list[int]
) -> None:
    bonus = [-INF, -INF, 0.0]
    logits = torch.cat([torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([bonus])])
    result = rejection_sample(
        logits,
        torch.tensor([draft]),
        torch.tensor([1]),
        draft_probs=torch.tensor([[0.2, 0.6, 0.2]]),
        temperature=torch.ones(1),
        accept_uniforms=torch.tensor([accept], dtype=torch.float64),
        sample_uniforms=torch.tensor([sample], dtype=torch.float64),
        backend=backend,
    )
    assert result.token_ids.tolist() == [emitted]


# Two drafts over three tokens, p = (.5, .3, .2) in every row and q = (.2, .6, .2).
# Drafts 1, 0: r = .5, 1 (1.25 cut), so h_2 = 1. Drafts 0, 1: r = 1, .5 and m_1 = .3, so
# h = 1, .5. Drafts 1, 1: r = .5, .25 and m_1 = .05, so h = .05 / .55 = 1/11, .25; after
# the first the residual is (.05, 0, 0).
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize(
    ("drafts", "accept", "sample", "emitted"),
    [
        ((1, 0), (0.99, 0.99), 0.6, [1, 0, 1]),
        ((0, 1), (0.99, 0.49), 0.6, [0, 1, 1]),
        ((0, 1), (0.99, 0.51), 0.999, [0, 0, -1]),
        ((1, 1), (0.99, 0.24), 0.9, [1, 1, 2]),
        ((1, 1), (0.09, 0.26), 0.999, [1, 0, -1]),
        ((1, 1), (0.10, 0.26), 0.999, [0, -1, -1]),
        ((0, 7), (0.99, 0.0), 0.999, [0, 0, -1]),  # no such token
    ],
)
def test_block_by_hand(
    backend: str,
    drafts: tuple[int, int],
    accept: tuple[float, float],
    sample: float,
    emitted: list[int],
) -> None:
    result = rejection_sample(
        torch.tensor([[0.5, 0.3, 0.2]] * 3).log(),
        torch.tensor(drafts),
        torch.tensor([2]),
        draft_probs=torch.tensor([[0.2, 0.6, 0.2]] * 2),
        temperature=torch.ones(1),
        accept_uniforms=torch.tensor(accept, dtype=torch.float64),
        sample_uniforms=torch.tensor([sample], dtype=torch.float64),
        method="block",
        backend=backend,
    )
    assert result.token_ids.tolist() == [emitted]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_block_with_onehot_drafts_by_hand(backend: str) -> None:
    """r = .5, .25; m_1 = .5 * .5, so h_1 = .25 / .75 = 1/3."""
    for first, second, emitted in (
        (0.99, 0.24, [0, 0, 1]),
        (0.32, 0.26, [0, 1, -1]),
        (0.34, 0.26, [1, -1, -1]),
    ):
        result = rejection_sample(
            torch.zeros(3, 2),
            torch.tensor([0, 0]),
            torch.tensor([2]),
            temperature=torch.ones(1),
            accept_uniforms=torch.tensor([first, second], dtype=torch.float64),
            sample_uniforms=torch.tensor([0.9], dtype=torch.float64),
            method="block",
            backend=backend,
        )
        assert result.token_ids.tolist() == [emitted]


@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("drafts", KINDS)
def test_block_ends_before_a_row_that_is_no_distribution(
    backend: str, drafts: str
) -> None:
    case = make_case(9, lengths=(3,), drafts=drafts, sampling="random", method="block")
    case.options["accept_uniforms"].zero_()  # type: ignore[union-attr]
    assert case.run(backend).num_emitted.tolist() == [4]
    case.logits[1] = -INF
    case.logits[1, 5] = INF
    result = case.run(backend)
    assert result.token_ids.tolist() == [[int(case.draft_ids[0]), 5, -1, -1]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sampling", ["greedy", "random", "mixed"])
@pytest.mark.parametrize("drafts", KINDS)
@pytest.mark.parametrize("vocab", VOCABS)
def test_native_equals_reference(
    native: None, vocab: int, drafts: str, sampling: str, method: str
) -> None:
    for seed in range(1 if vocab > 2049 else 5):
        case = make_case(
            seed, vocab=vocab, drafts=drafts, sampling=sampling, method=method
        )
        assert_same(case.run("reference"), case.run("native"))


@pytest.mark.parametrize("drafts", KINDS)
@pytest.mark.parametrize("vocab", [151_936, 151_937, 131_071])
def test_large_vocabularies(native: None, vocab: int, drafts: str) -> None:
    # Rows shared out, and requests.
    for lengths, method in itertools.product(((2,), (2, 0, 1, 3, 1)), METHODS):
        case = make_case(
            vocab, vocab=vocab, lengths=lengths, drafts=drafts, method=method
        )
        assert_same(case.run("reference"), case.run("native"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("drafts", KINDS)
def test_every_instruction_set(isa: str, drafts: str, dtype: torch.dtype) -> None:
    for seed, vocab in enumerate([33, 47, 1000, 2049, 5000]):
        for sampling in ("greedy", "random"):
            case = make_case(
                seed, vocab=vocab, drafts=drafts, sampling=sampling, dtype=dtype
            )
            assert_same(case.run("reference"), case.run("native"))
            case.method = "block"
            assert_same(case.run("reference"), case.run("native"))


@pytest.mark.parametrize("drafts", KINDS)
def test_masked_logits_and_strided_rows(isa: str, drafts: str) -> None:
    for seed, masked in enumerate([0.3, 0.9, 1.0]):  # 1.0: one finite logit is left
        case = make_case(seed, drafts=drafts, masked=masked, row_padding=5)
        assert not case.logits.is_contiguous()
        case.method = "block"
        assert_same(case.run("reference"), case.run("native"))
        case.method = "standard"
        result = case.run("native")
        assert_same(case.run("reference"), result)
        rows = torch.arange(case.logits.shape[0]).split((case.lengths + 1).tolist())
        for r, tokens in enumerate(result.token_ids.tolist()):
            for row, token in zip(rows[r], tokens, strict=False):
                assert token == -1 or case.logits[row, token] > -INF


@pytest.mark.parametrize("lengths", [(0,), (0, 0, 0), (0,) * 9, ()])
def test_no_drafts(native: None, lengths: tuple[int, ...]) -> None:
    for drafts in KINDS:
        case = make_case(3, lengths=lengths, drafts=drafts)
        result = case.run("native")
        assert_same(case.run("reference"), result)
        assert result.token_ids.shape == (len(lengths), 1)
        assert (result.num_emitted == 1).all()


def test_int32_ids_and_lengths(native: None) -> None:
    case = make_case(4)
    same = Case(
        case.logits, case.draft_ids.int(), case.lengths.int(), options=case.options
    )
    assert_same(case.run("reference"), same.run("native"))
    assert_same(case.run("reference"), same.run("reference"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_equal_distributions_accept_everything(backend: str, method: str) -> None:
    case = make_case(
        5, vocab=3000, sampling="random", lengths=(4, 2, 6, 3), method=method
    )
    temperature = case.options["temperature"]
    assert temperature is not None
    temperature.fill_(1.0)
    rows = [k for k in range(case.logits.shape[0]) if k not in (4, 7, 14, 18)]
    case.options["draft_probs"] = case.logits[rows].softmax(-1)
    result = case.run(backend)
    assert result.num_emitted.tolist() == [5, 3, 7, 4]
    # A draft that q cannot have drawn, and no residual: a draw from p.
    case.options["draft_probs"][0, case.draft_ids[0]] = 0.0  # type: ignore[index]
    assert case.run(backend).num_emitted.tolist() == [1, 3, 7, 4]
    assert case.run(backend).token_ids[0, 0] >= 0


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_draft_outside_its_support_is_rejected(backend: str) -> None:
    case = make_case(6, drafts="topk", sampling="random", lengths=(1,) * 6)
    support = case.options["draft_support"]
    assert support is not None and case.options["accept_uniforms"] is not None
    case.options["accept_uniforms"].zero_()
    assert (case.run(backend).num_emitted == 2).all()
    for i in range(6):
        outside = [v for v in range(1000) if v not in support[i].tolist()]
        case.draft_ids[i] = outside[i]
    assert (case.run(backend).num_emitted == 1).all()


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_extreme_uniforms_never_give_a_zero_weight_token(backend: str) -> None:
    for drafts, method in itertools.product(KINDS, METHODS):
        for u in (0.0, 1.0 - 2.0**-53):
            case = make_case(
                7,
                vocab=4099,
                drafts=drafts,
                sampling="random",
                masked=0.5,
                method=method,
            )
            for name in ("accept_uniforms", "sample_uniforms"):
                uniforms = case.options[name]
                assert uniforms is not None
                uniforms.fill_(u)
            result = case.run(backend)
            starts = (case.lengths + 1).cumsum(0) - (case.lengths + 1)
            last = result.token_ids.gather(1, result.num_emitted[:, None].long() - 1)
            rows = starts + result.num_emitted - 1
            assert (case.logits[rows, last[:, 0].long()] > -INF).all()


def test_ties_take_the_lowest_index(isa: str) -> None:
    logits = torch.zeros(1, 5000)
    for ids in ([4999, 37], [2048, 2047], [16, 15, 4000]):
        logits.zero_()
        logits[0, ids] = 1.0
        empty = torch.zeros(0, dtype=torch.int64)
        for dtype in (torch.float32, torch.bfloat16):
            result = rejection_sample(logits.to(dtype), empty, torch.tensor([0]))
            assert result.token_ids.item() == min(ids)


def test_result_does_not_depend_on_threads(native: None) -> None:
    # Requests shared out, and with one request and four threads its rows.
    for lengths, vocab in (((3,), 70_001), ((1, 2), 70_001), ((4, 0, 2, 7, 1), 40_001)):
        for drafts, method in itertools.product(KINDS, METHODS):
            case = make_case(
                8, vocab=vocab, lengths=lengths, drafts=drafts, method=method
            )
            results = []
            for count in (1, 2, 4):
                torch.set_num_threads(count)
                results.append(case.run("native"))
            assert_same(results[0], results[1])
            assert_same(results[0], results[2])

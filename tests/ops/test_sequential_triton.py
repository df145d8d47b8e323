"""The Triton backend of `draft_sequential`, interpreted: equal to the reference.

Sizes reach every tail: a rank below and above one chunk, a vocabulary that is no
multiple of a block, 17 requests (two groups), candidates in one block and in several.
float32 weights: token for token.
"""

from __future__ import annotations

import importlib.util

import pytest

from tests.ops.interpreter import run_script
from tests.ops.sequential_cases import make_block, make_head
from vllm_dspark.ops import draft_sequential

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

CHECK = """
import itertools, math
from tests.ops.sequential_cases import HEADS, make_block, make_head
from tests.ops.test_sequential import assert_same
def check(head_type="vanilla", seed=1, head=None, **options):
    head = make_head(seed, head_type, **(head or {}))
    block = make_block(seed, head, **options)
    assert_same(block.run("reference"), block.run("triton"))
"""

EVERY_HEAD = """
for head_type, topk, sampling in itertools.product(
    HEADS, (None, 1, 12, 10_000), ("greedy", "random", "mixed")
):
    for draft_vocab, confidence in ((None, "markov"), (77, "plain")):
        head = {"draft_vocab": draft_vocab, "confidence": confidence}
        check(head_type, head=head, topk=topk, sampling=sampling, requests=3,
              positions=3, masked=0.3)
print("equal")
"""

SIZES = """
for vocab, draft_vocab, rank, topk in (
    (32, None, 5, None), (33, 31, 80, 20), (1000, 333, 33, 200), (1000, None, 64, None),
):
    for head_type in ("vanilla", "gated", "rnn"):
        head = {"vocab": vocab, "draft_vocab": draft_vocab, "rank": rank, "hidden": 70}
        check(head_type, head=head, topk=topk, requests=17, positions=2,
              return_probs=False)
for requests, positions in ((0, 3), (2, 0), (1, 1)):
    for topk in (None, 9):
        check("rnn", topk=topk, requests=requests, positions=positions)
print("equal")
"""

EDGES = """
for head_type, topk, sampling in itertools.product(
    HEADS, (None, 12), ("greedy", "random")
):
    head = make_head(1, head_type)
    one = make_block(1, head, topk=topk, sampling=sampling, masked=1.0, requests=2,
                     positions=2)
    result = one.run("triton")
    assert (result.token_ids == 100).all()
    assert_same(one.run("reference"), result)
    block = make_block(1, head, topk=topk, sampling=sampling)
    expected = block.run("reference")
    block.base[1, 2, 33], block.base[2, 4, 7] = math.nan, math.inf
    block.base[3, 0], block.hidden[4, 3, 5] = -math.inf, math.nan
    result = block.run("triton")
    assert result.finite.tolist() == [True, False, False, False, False, True]
    assert ((result.token_ids >= 0) & (result.token_ids < 200)).all()
    for r in (0, 5):
        assert torch.equal(result.token_ids[r], expected.token_ids[r])
ties = make_block(1, make_head(1, "none", vocab=300, confidence="none"), topk=5,
                  sampling="greedy", requests=2)
ties.base.zero_()
ties.base[:, :, 3::2] = -0.0
ties.base[:, :, [290, 131, 70]] = 1.0
result = ties.run("triton")
assert (result.token_ids == 70).all()
assert result.draft_support[0, 0].tolist() == [0, 1, 70, 131, 290]
print("equal")
"""

BFLOAT16 = """
for head_type, topk in itertools.product(HEADS, (None, 20)):
    head = make_head(3, head_type, vocab=600, rank=32, dtype=torch.bfloat16)
    block = make_block(4, head, requests=12, positions=1, topk=topk,
                       dtype=torch.bfloat16)
    a, b = block.run("reference"), block.run("triton")
    assert torch.equal(a.finite, b.finite)
    assert torch.equal(a.token_ids, b.token_ids), (head_type, topk)
    torch.testing.assert_close(a.draft_probs, b.draft_probs, atol=0.02, rtol=0.02)
    torch.testing.assert_close(a.confidence, b.confidence)
print("equal")
"""

LARGE = """
check(head={"vocab": 151_936, "rank": 8}, requests=2, positions=1, sampling="random")
check(head={"vocab": 151_936, "rank": 8}, requests=1, positions=2, topk=40)
print("equal")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(EVERY_HEAD, id="every-head", marks=pytest.mark.slow),
        pytest.param(SIZES, id="sizes", marks=pytest.mark.slow),
        pytest.param(EDGES, id="edges"),
        pytest.param(BFLOAT16, id="bfloat16"),
        pytest.param(LARGE, id="large", marks=pytest.mark.slow),
    ],
)
def test_interpreted_equals_reference(script: str) -> None:
    assert run_script(CHECK + script, interpret=True).strip() == "equal"


def test_cpu_tensors_are_refused() -> None:
    block = make_block(1, make_head(1, "vanilla"))
    args = (block.base, block.hidden, block.anchors, block.head)
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors, got cpu.*INTERPRET=1"):
        draft_sequential(*args, backend="triton", **block.options)

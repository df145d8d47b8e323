"""The native backend reads no row it does not need, and nothing beyond a row's end."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tests.ops.rejection_cases import KINDS, assert_same, make_case

# Rows after the first rejection, and the page behind the last row, may not be touched.
FORBIDDEN_PAGES = """
import ctypes, itertools, mmap, torch
from vllm_dspark.ops import extension_native, rejection_sample
PAGE = mmap.PAGESIZE
module = extension_native.require()
libc = ctypes.CDLL(None, use_errno=True)

def check(requests, dtype, random):
    memory = mmap.mmap(-1, PAGE * (4 * requests + 1))
    V = PAGE // dtype.itemsize
    logits = torch.frombuffer(memory, dtype=dtype)[: 4 * requests * V].view(-1, V)
    logits.normal_()
    logits[:, 0] = 0  # no draft is column 0, which odd leaves out
    ids = torch.zeros(requests, 3, dtype=torch.int64)
    ids[:, 0] = logits[::4].argmax(-1)   # accepted
    ids[:, 1] = logits[1::4].argmin(-1)  # rejected
    temperature = torch.ones(requests) if random else None
    uniforms = torch.zeros(requests, 3, dtype=torch.float64)
    uniforms[:, 1] = 0.999
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    pages = [4 * r + k for r in range(requests) for k in (2, 3)] + [4 * requests]
    for page in pages:
        assert libc.mprotect(ctypes.c_void_p(base + page * PAGE), PAGE, 0) == 0
    for isa in ("scalar", "avx2", "avx512", "avx512_bf16", "amx"):
        try:
            module.set_isa(isa)
        except RuntimeError:
            continue
        for odd in (0, 1):  # a row that ends just before the forbidden page
            result = rejection_sample(
                logits[:, odd:], (ids - odd).view(-1),
                torch.full((requests,), 3), temperature=temperature,
                accept_uniforms=uniforms.view(-1), sample_uniforms=uniforms[:, 0] + .5,
                backend="native")
            assert result.num_emitted.tolist() == [2] * requests, result

for dtype in (torch.float32, torch.bfloat16):
    for requests, random in itertools.product((1, 5), (False, True)):
        check(requests, dtype, random)
        print("untouched", requests, dtype, random, flush=True)
"""


def test_forbidden_pages(native: None) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN_PAGES],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr[-2000:])
    assert done.stdout.count("untouched") == 8


def test_block_verification_stops_where_nothing_can_be_accepted(isa: str) -> None:
    """A draft that the target cannot emit: the rows behind it are not read."""
    case = make_case(3, lengths=(6, 5), sampling="random", method="block")
    for row, draft in ((2, 2), (8, 7)):
        case.logits[row, case.draft_ids[draft]] = -float("inf")
    expected = case.run("reference")
    case.logits[3:7] = case.logits[10:] = float("nan")
    assert_same(expected, case.run("native"))
    assert_same(expected, case.run("reference"))


@pytest.mark.parametrize("drafts", KINDS)
def test_poisoned_rows(isa: str, drafts: str) -> None:
    for seed in range(4):
        case = make_case(seed, drafts=drafts, lengths=(7, 7, 5, 0, 7, 2))
        expected = case.run("reference")
        start = 0
        for r, length in enumerate(case.lengths.tolist()):
            unread = slice(start + int(expected.num_emitted[r]), start + length + 1)
            case.logits[unread] = float("nan")
            start += length + 1
        assert bool(case.logits.isnan().any())
        assert_same(expected, case.run("native"))
        assert torch.equal(expected.token_ids, case.run("reference").token_ids)

"""The Triton backend without a GPU: interpreted on the CPU, and compiled for GPUs.

Interpretation must be asked for before triton is imported, and once it is, this process
can compile no more; so the two live in processes of their own.
"""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch

from tests.ops.interpreter import run_script
from vllm_dspark.ops import rejection_sample

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)

METHODS = ("standard", "block")
INTERPRET = """
import itertools, torch
torch.set_num_threads(1)
from tests.ops.rejection_cases import KINDS, assert_same, make_case
def check(**options):
    for method in ("standard", "block"):
        case = make_case(1, method=method, **options)
        assert_same(case.run("reference"), case.run("triton"))
for drafts, sampling in itertools.product(KINDS, ("greedy", "random", "mixed")):
    for vocab in (32, 33, 1000, 9001):
        check(vocab=vocab, drafts=drafts, sampling=sampling)
    check(vocab=1000, drafts=drafts, sampling=sampling, dtype=torch.bfloat16)
    check(drafts=drafts, sampling=sampling, masked=0.9, row_padding=3)
    check(drafts=drafts, sampling=sampling, masked=1.0)
    for lengths in ((0,), (0, 0), ()):
        check(drafts=drafts, sampling=sampling, lengths=lengths)
for vocab in (49152, 151_937):
    check(vocab=vocab, lengths=(2, 0, 1))
case = make_case(2, vocab=300)
case.draft_ids[::3] = 300
case.draft_ids[1::3] = -1
assert_same(case.run("reference"), case.run("triton"))
case.method = "block"
assert_same(case.run("reference"), case.run("triton"))
case.logits[1::3] = -float("inf")  # no distribution
assert_same(case.run("reference"), case.run("triton"))
print("interpreted")
"""

COMPILE = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from vllm_dspark.ops import rejection_triton as rt
arguments = {
    "logits": None, "logits_stride": "i64", "vocab": "i32", "draft_ids": "*i64",
    "ends": "*i64", "lengths": "*i32", "draft_probs": "*fp32", "probs_stride": "i64",
    "support": "*i32", "support_stride": "i64", "support_size": "i32", "dense": "*fp32",
    "temperature": "*fp32", "accept_uniforms": "*fp64", "sample_uniforms": "*fp64",
    "token_ids": "*i32", "width": "i32", "num_emitted": "*i32",
}
every = (("*bf16", 0, "block"), ("*fp32", 1, "block"), ("*bf16", 2, "standard"))
for capability, modes in ((80, every[1:]), (90, every), (100, every[:2])):
    for logits, mode, method in modes:
        constants = {"MODE": mode, "RANDOM": True, "METHOD": method,
                     "BLOCK": rt.BLOCK, "CHUNK": 512}
        signature = {**arguments, "logits": logits}
        signature.update({name: "constexpr" for name in constants})
        source = ASTSource(rt.rejection_kernel, signature, constexprs=constants)
        binary = triton.compile(
            source, target=GPUTarget("cuda", capability, 32),
            options={"num_warps": rt.NUM_WARPS, "enable_fp_fusion": False})
        assert f"sm_{capability}" in binary.asm["ptx"], capability
        print("compiled", capability, logits, mode, flush=True)
"""


def test_interpreted_equals_reference() -> None:
    assert run_script(INTERPRET, interpret=True).strip() == "interpreted"


def test_compiles_for_gpus() -> None:
    assert run_script(COMPILE, interpret=False).count("compiled") == 7


def test_cpu_tensors_are_refused() -> None:
    logits, ids = torch.zeros(1, 4), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"needs CUDA tensors, got cpu.*INTERPRET=1"):
        rejection_sample(logits, ids, torch.tensor([0]), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_equals_reference() -> None:
    from tests.ops.rejection_cases import KINDS, Case, make_case

    for drafts in KINDS:
        for vocab, method in itertools.product((33, 1000, 49152, 151_937), METHODS):
            case = make_case(3, vocab=vocab, drafts=drafts, method=method)
            options = {
                k: None if v is None else v.cuda() for k, v in case.options.items()
            }
            on_gpu = Case(
                case.logits.cuda(),
                case.draft_ids.cuda(),
                case.lengths.cuda(),
                options,
                method,
            )
            result, expected = on_gpu.run("triton"), case.run("reference")
            assert torch.equal(result.token_ids.cpu(), expected.token_ids)

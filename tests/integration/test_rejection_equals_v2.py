"""Our rejection sampling accepts what vLLM's V2 kernels accept, given their uniforms.

vLLM's kernels run in Triton's interpreter, on processed logits (temperature, and all
but the upper two fifths masked, as top-k and top-p do), with dense and with one-hot
drafts and placeholders of -1. The token after the accepted ones is only compared where
it is greedy: vLLM draws it by Gumbel noise over the vocabulary, ours by inverse CDF
from one uniform, so it has the same distribution and not the same value.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")

SCRIPT = """
import sys
from tests.integration.oracle import v2_patches
v2_patches.install()
import torch, triton, triton.language as tl
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as v2
from vllm_dspark.ops import rejection_sample

LENGTHS, STEPS, VOCAB = (3, 0, 5, 1, 4), 5, 500

@triton.jit
def uniforms_kernel(seeds, positions, out):
    i = tl.program_id(0)
    u = tl.rand(tl.load(seeds + i), tl.load(positions + i))
    tl.store(out + i, tl.maximum(u, 4.6566127342e-10))

def compare(seed, onehot, backend):
    g = torch.Generator().manual_seed(seed)
    request = torch.tensor([r for r, l in enumerate(LENGTHS) for _ in range(l + 1)])
    step = torch.tensor([k for l in LENGTHS for k in range(l + 1)])
    ends = torch.tensor([0, *(l + 1 for l in LENGTHS)]).cumsum(0)
    n = len(request)
    temperature = 0.3 + torch.rand(len(LENGTHS), generator=g)
    temperature[1::3] = 0.0
    t = torch.where(temperature == 0, 1.0, temperature)
    raw = 3 * torch.randn(n, VOCAB, generator=g)
    logits = raw / t[request][:, None]
    cut = logits.kthvalue(int(0.6 * VOCAB), -1, keepdim=True).values
    logits[logits < cut] = -float("inf")
    positions = torch.randint(0, 1000, (n,), generator=g)
    seeds = torch.randint(0, 2**31, (len(LENGTHS),), generator=g)
    draft_logits = torch.zeros(len(LENGTHS), STEPS, VOCAB)
    drafts, rows, ids, probs = torch.zeros(n, dtype=torch.int64), [], [], []
    for i in range(n):
        r, k = int(request[i]), int(step[i])
        if k == LENGTHS[r]:
            continue
        near = raw[i] + 0.7 * torch.randn(VOCAB, generator=g)
        draft_logits[r, k], q = near, (near / t[r]).softmax(-1)
        sampled = temperature[r] > 0 and not onehot
        x = torch.multinomial(q, 1, generator=g) if sampled else near.argmax()
        x = -1 if (seed + i) % 11 == 0 else int(x)
        drafts[i + 1] = x
        rows.append(i), ids.append(x), probs.append(q)
    u = torch.zeros(n)
    uniforms_kernel[(n,)](seeds[request], positions, u)
    ints = lambda x: x.to(torch.int32)
    theirs, count = v2.rejection_sample(
        logits.clone(), None if onehot else draft_logits, drafts, ints(ends),
        positions, torch.arange(len(LENGTHS), dtype=torch.int32), ints(request),
        ints(step), temperature, seeds, STEPS)
    ours = rejection_sample(
        logits, torch.tensor(ids), torch.tensor(LENGTHS),
        draft_probs=None if onehot else torch.stack(probs),
        temperature=(temperature > 0).float(), accept_uniforms=u[rows].double(),
        sample_uniforms=torch.rand(len(LENGTHS), generator=g, dtype=torch.float64),
        backend=backend)
    assert torch.equal(ints(count), ours.num_emitted), (seed, count, ours.num_emitted)
    for r, emitted in enumerate(count.tolist()):
        same = emitted if temperature[r] == 0 else emitted - 1
        assert theirs[r, :same].tolist() == ours.token_ids[r, :same].tolist(), seed
    return int((count - 1).sum())

for backend, seeds in (("reference", 20), ("triton", 5)):
    for onehot in (False, True):
        accepted = sum(compare(seed, onehot, backend) for seed in range(seeds))
        assert accepted > seeds, "hardly anything was accepted: nothing compared"
print("equal")
"""


@pytest.mark.slow
def test_accepts_what_v2_accepts() -> None:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("equal")

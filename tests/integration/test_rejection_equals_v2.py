"""Our rejection sampling emits what vLLM's V2 kernels emit.

vLLM's kernels run in Triton's interpreter, on processed logits (temperature, and all
but the upper two fifths masked, as top-k and top-p do), with dense and with one-hot
drafts and placeholders of -1, greedy and sampled requests, both methods.

- `rejection_kernel: dspark` gets vLLM's own arguments, seeds included: every token.
- `ops.rejection_sample` gets the uniform numbers that vLLM draws: it accepts the same.
  A placeholder is no draft to it, but the end of the request's drafts. The token after
  the accepted ones is only compared where it is greedy: vLLM draws it by Gumbel noise
  over the vocabulary, the operation by inverse CDF from one uniform number.
"""

from __future__ import annotations

import pytest

from tests.integration.subprocesses import run_python

pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")

SCRIPT = """
import itertools, sys
from tests.integration.oracle import v2_patches
v2_patches.install()
import torch, triton, triton.language as tl
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as v2
from vllm_dspark.integration.v2 import rejection_triton as ours_v2
from vllm_dspark.ops import rejection_sample

torch.set_num_threads(1)
LENGTHS, STEPS = (3, 0, 5, 1, 4, 5), 5
ints = lambda x: x.to(torch.int32)

@triton.jit
def uniforms_kernel(seeds, positions, out):
    i = tl.program_id(0)
    u = tl.rand(tl.load(seeds + i), tl.load(positions + i))
    tl.store(out + i, tl.maximum(u, 4.6566127342e-10))

def step_seeds(seeds, step):  # vLLM 0.33 mixes the draft's number in
    new = hasattr(v2, "spec_step_seed")
    return seeds ^ (step << 32) if new else seeds

class Batch:
    def __init__(self, seed, onehot, vocab=500, equal=False, draft_vocab=0):
        g = torch.Generator().manual_seed(seed)
        num = len(LENGTHS)
        # Requests are in slots of their own order, with one that is not in the batch.
        self.slots = torch.randperm(num + 1, generator=g)[:num]
        rows = [(r, k) for r, l in enumerate(LENGTHS) for k in range(l + 1)]
        self.request, self.step = torch.tensor(rows).T.contiguous()
        self.starts = torch.tensor([0, *(l + 1 for l in LENGTHS)]).cumsum(0)
        n = len(self.request)
        self.temperature = 0.3 + torch.rand(num + 1, generator=g)
        self.temperature[self.slots[1::3]] = 0.0
        self.t = self.temperature[self.slots]
        t = torch.where(self.t == 0, 1.0, self.t)
        raw = 3 * torch.randn(n, vocab, generator=g)
        self.logits = raw / t[self.request][:, None]
        if not equal:
            cut = self.logits.kthvalue(int(0.6 * vocab), -1, keepdim=True).values
            self.logits[self.logits < cut] = -float("inf")
        self.positions = torch.randint(0, 1000, (n,), generator=g)
        self.seeds = torch.randint(-2**62, 2**62, (num + 1,), generator=g)
        self.onehot = onehot
        self.draft_logits = torch.zeros(num + 1, STEPS, draft_vocab or vocab)
        self.drafts = torch.full((n,), 7)
        self.lengths, self.rows, self.ids, self.probs = [], [], [], []
        for r, length in enumerate(LENGTHS):
            valid, before = True, len(self.rows)
            for k in range(length):
                i = int(self.starts[r]) + k
                near = raw[i][: draft_vocab or vocab]
                if not equal:
                    near = near + 0.7 * torch.randn(near.shape, generator=g)
                q = (near / t[r]).softmax(-1)
                self.draft_logits[self.slots[r], k] = near
                sampled = self.t[r] > 0 and not onehot
                x = torch.multinomial(q, 1, generator=g) if sampled else near.argmax()
                x = -1 if (seed + i) % 11 == 0 and not equal else x
                self.drafts[i + 1] = x = int(x)
                valid = valid and x >= 0
                if valid:
                    self.rows.append(i), self.ids.append(x), self.probs.append(q)
            self.lengths.append(len(self.rows) - before)
        self.g = g

    def theirs(self, method, fp64=False):
        return v2.rejection_sample(
            self.logits.clone(), None if self.onehot else self.draft_logits,
            self.drafts, ints(self.starts), self.positions, ints(self.slots),
            ints(self.slots[self.request]), ints(self.step), self.temperature,
            self.seeds, STEPS, use_fp64=fp64, use_block_verification=method == "block")

    def compare_kernel(self, method, fp64=False):
        theirs, count = self.theirs(method, fp64)
        ours, num = ours_v2.rejection_sample(ours_v2.V2Inputs(
            self.logits, None if self.onehot else self.draft_logits, self.drafts,
            ints(self.starts), self.positions, ints(self.slots), self.temperature,
            self.seeds, STEPS, method, fp64))
        assert num.dtype == count.dtype and ours.dtype == theirs.dtype
        assert torch.equal(count, num), (count, num)
        used = torch.arange(STEPS + 1) < count[:, None]
        assert torch.equal(theirs[used], ours[used]), (theirs, ours, count)
        assert (ours[~used] == -1).all()
        return int((count - 1).sum())

    def compare_operation(self, method, backend):
        theirs, count = self.theirs(method)
        u, seeds = torch.zeros(len(self.request)), self.seeds[self.slots][self.request]
        if method == "block":
            seeds = step_seeds(seeds, self.step)
        uniforms_kernel[(len(u),)](seeds, self.positions, u)
        kept = [i for r, l in enumerate(self.lengths)
                for i in range(int(self.starts[r]), int(self.starts[r]) + l + 1)]
        ours = rejection_sample(
            self.logits[kept], torch.tensor(self.ids), torch.tensor(self.lengths),
            draft_probs=None if self.onehot else torch.stack(self.probs),
            temperature=(self.t > 0).float(), accept_uniforms=u[self.rows].double(),
            sample_uniforms=torch.rand(
                len(LENGTHS), generator=self.g, dtype=torch.float64),
            method=method, backend=backend)
        assert torch.equal(ints(count), ours.num_emitted), (count, ours.num_emitted)
        for r, emitted in enumerate(count.tolist()):
            same = emitted if self.t[r] == 0 else emitted - 1
            assert theirs[r, :same].tolist() == ours.token_ids[r, :same].tolist()
        return int((count - 1).sum())
"""

CASES = {
    "operation": """
for backend, seeds in (("reference", 10), ("triton", 4)):
    for onehot, method in itertools.product((False, True), ("standard", "block")):
        accepted = sum(
            Batch(s, onehot).compare_operation(method, backend) for s in range(seeds))
        assert accepted > seeds, "hardly anything was accepted: nothing compared"
""",
    "kernel": """
for onehot, method in itertools.product((False, True), ("standard", "block")):
    accepted = sum(Batch(s, onehot).compare_kernel(method) for s in range(12))
    assert accepted > 12, "hardly anything was accepted: nothing compared"
""",
    "kernel, other shapes": """
for onehot, method in itertools.product((False, True), ("standard", "block")):
    for fp64 in (False, True):
        Batch(30, onehot, vocab=9001).compare_kernel(method, fp64)  # blocks of both
        Batch(31, onehot, vocab=500).compare_kernel(method, fp64)
    Batch(33, onehot, vocab=500, draft_vocab=480).compare_kernel(method)
for method in ("standard", "block"):  # p = q: all drafts are accepted
    batch = Batch(32, False, equal=True)
    batch.compare_kernel(method)
    random = batch.t > 0
    assert (batch.theirs(method)[1] - 1)[random].tolist() == [
        l for l, t in zip(LENGTHS, batch.t) if t > 0]
""",
}


@pytest.mark.slow
@pytest.mark.v2
@pytest.mark.parametrize("case", CASES)
def test_equals_v2(case: str) -> None:
    script = SCRIPT + CASES[case] + "print('[]')"  # reached where all was equal
    assert run_python(script, start="v2") == []

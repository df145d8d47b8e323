"""Kernels on the GPU: against their references, and how long they take."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

VOCABULARIES = (49_152, 151_936)
REQUESTS = (1, 8, 32)
POSITIONS = 7


def median_us(call: Callable[[], object], rounds: int = 50) -> float:
    """Median microseconds of a call on the device, by CUDA events."""
    for _ in range(5):
        call()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def moved(value: Any, device: str) -> Any:
    """A tensor, or a dataclass of tensors, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(
            value, **{n: moved(v, device) for n, v in fields.items()}
        )
    return value


@dataclasses.dataclass(frozen=True)
class Verification:
    """One batch for both rejection kernels of the V2 runner, on the device."""

    inputs: Any  # V2Inputs
    request: Tensor
    step: Tensor

    def theirs(self) -> tuple[Tensor, Tensor]:
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils as vllm

        i = self.inputs
        sampled, count = vllm.rejection_sample(
            i.target_logits,
            i.draft_logits,
            i.draft_sampled,
            i.cu_num_logits,
            i.pos,
            i.idx_mapping,
            i.idx_mapping[self.request],
            self.step,
            i.temperature,
            i.seed,
            i.num_speculative_steps,
            use_fp64=i.use_fp64,
            use_block_verification=i.method == "block",
        )[:2]
        return sampled, count

    def ours(self) -> tuple[Tensor, Tensor]:
        from vllm_dspark.integration.v2.rejection_triton import rejection_sample

        return rejection_sample(self.inputs)


def verification(
    vocab: int, num: int, dense: bool, method: str, seed: int = 0
) -> Verification:
    """R requests with K drafts each, drawn from logits near the target's."""
    from vllm_dspark.integration.v2.rejection_triton import V2Inputs

    g = torch.Generator("cuda").manual_seed(seed)
    cuda: dict[str, Any] = {"device": "cuda", "generator": g}
    rows = num * (POSITIONS + 1)
    target = 4.0 * torch.randn(rows, vocab, **cuda)
    near = target.view(num, -1, vocab)[:, :-1]
    near = near + 0.5 * torch.randn(near.shape, **cuda)
    drafts = near.softmax(-1).flatten(0, 1).multinomial(1, generator=g).view(num, -1)
    if not dense:
        drafts = near.argmax(-1)
    ids = torch.full((num, POSITIONS + 1), -1, dtype=torch.int64, device="cuda")
    ids[:, 1:] = drafts
    ints = {"dtype": torch.int32, "device": "cuda"}
    inputs = V2Inputs(
        target,
        near.contiguous() if dense else None,
        ids.flatten(),
        torch.arange(0, rows + 1, POSITIONS + 1, **ints),
        torch.randint(0, 4000, (rows,), **cuda),
        torch.arange(num, **ints),
        torch.ones(num, device="cuda"),
        torch.randint(-(2**62), 2**62, (num,), **cuda),
        POSITIONS,
        method,
        False,
    )
    each = torch.arange(num, device="cuda").repeat_interleave(POSITIONS + 1)
    step = torch.arange(POSITIONS + 1, **ints).repeat(num)
    return Verification(inputs, each, step)


def rejection_equals() -> dict[str, Any]:
    """Tokens of both kernels; a comparison may fall otherwise by the last bits."""
    requests = differing = accepted = 0
    for seed in range(20):
        for dense in (True, False):
            for method in ("standard", "block"):
                batch = verification(4096, 32, dense, method, seed)
                (theirs, count), (ours, num) = batch.theirs(), batch.ours()
                used = torch.arange(POSITIONS + 1, device="cuda") < count[:, None]
                same = (count == num) & ((theirs == ours) | ~used).all(dim=1)
                requests += len(same)
                differing += int((~same).sum())
                accepted += int((count - 1).sum())
    few = differing <= requests / 1000
    return {
        "requests": requests,
        "differing": differing,
        "accepted": accepted,
        "passed": few and accepted > requests,
    }


def rejection_times() -> list[dict[str, Any]]:
    """Microseconds of one verification, vLLM's kernels and ours."""
    rows = []
    for vocab in VOCABULARIES:
        for num in REQUESTS:
            batch = verification(vocab, num, True, "standard")
            rows.append(
                {
                    "vocab_size": vocab,
                    "num_reqs": num,
                    "positions": POSITIONS,
                    "vllm_us": median_us(batch.theirs),
                    "dspark_us": median_us(batch.ours),
                }
            )
            print(rows[-1], flush=True)
    return rows


def sequential_batch(num: int) -> tuple[Any, ...]:
    """Base logits, hidden states, anchors and a head of the demo drafter's shape."""
    from bench_sequential import random_head

    head, width, vocab, positions = random_head()
    g = torch.Generator().manual_seed(num)
    base = 3.0 * torch.randn(num, positions, vocab, generator=g)
    hidden = torch.randn(num, positions, width, generator=g).bfloat16()
    anchors = torch.randint(0, vocab, (num,), generator=g)
    return tuple(moved(v, "cuda") for v in (base.bfloat16(), hidden, anchors, head))


def sequential_equals() -> dict[str, Any]:
    """Greedy drafts of the fused kernel and of the plain loop."""
    from vllm_dspark.ops import draft_sequential

    drafts = differing = 0
    for num in (*REQUESTS, 5):
        batch = sequential_batch(num)
        ours = draft_sequential(*batch, backend="triton").token_ids
        plain = draft_sequential(*batch, backend="reference").token_ids
        # One bfloat16 near-tie changes what follows it: first differences count.
        differing += int((ours != plain).any(dim=1).sum())
        drafts += len(ours)
    return {"blocks": drafts, "differing": differing, "passed": differing <= 1}


def sequential_times() -> list[dict[str, Any]]:
    """Microseconds of one block's loop, fused and plain."""
    from vllm_dspark.ops import draft_sequential

    rows = []
    for num in REQUESTS:
        batch = sequential_batch(num)
        row: dict[str, Any] = {"num_reqs": num, "positions": POSITIONS}
        for backend in ("triton", "reference"):
            row[f"{backend}_us"] = median_us(
                lambda b=batch, name=backend: draft_sequential(*b, backend=name)
            )
        rows.append(row)
        print(row, flush=True)
    return rows


PARTS: dict[str, Callable[[], Any]] = {
    "rejection kernel against vLLM's": rejection_equals,
    "rejection kernel, times": rejection_times,
    "sequential head against the plain loop": sequential_equals,
    "sequential head, times": sequential_times,
}

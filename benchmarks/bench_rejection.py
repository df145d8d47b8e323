"""Rejection sampling, from target logits to emitted tokens: ours against vLLM's.

    python benchmarks/bench_rejection.py --json rejection.json
    python benchmarks/bench_rejection.py --vocab 32000 --reqs 1 --rounds 3  # seconds

Providers: `reference` and `native` of `vllm_dspark.ops.rejection_sample`, timed as the
plugin calls it, and `vllm`, the V1 rejection sampler of an installed vLLM on the CPU,
from the same logits to output tokens. Every request has `block_size` drafts of which
two to three are accepted on average (float32, dense draft probabilities at temperature
1, argmax drafts when greedy). vLLM's path is timed as it is: at temperature 1 it reads
uninitialised temperatures, which costs it no time. Without vLLM its column is left out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import _bench_common as common
import torch
from torch import Tensor

from vllm_dspark.ops import native_status, rejection_sample


@dataclass
class Inputs:
    """One batch; `temperature` is 0 or 1 for all requests."""

    logits: Tensor
    draft_ids: Tensor
    lengths: Tensor
    temperature: float
    draft_probs: Tensor | None
    accept: Tensor
    sample: Tensor

    @property
    def draft_rows(self) -> Tensor:
        """Rows of `logits` that belong to drafts."""
        rows = torch.arange(self.logits.shape[0]).view(len(self.lengths), -1)
        return rows[:, :-1].flatten()

    def run(self, backend: str) -> Any:
        """Our operator, with the arguments the plugin would give it."""
        if self.temperature == 0:
            args = (self.logits, self.draft_ids, self.lengths)
            return rejection_sample(*args, backend=backend)
        return rejection_sample(
            self.logits,
            self.draft_ids,
            self.lengths,
            draft_probs=self.draft_probs,
            temperature=torch.ones(len(self.lengths)),
            accept_uniforms=self.accept,
            sample_uniforms=self.sample,
            backend=backend,
        )


def make_inputs(vocab: int, num: int, block: int, temperature: float) -> Inputs:
    """The first seed with two to three accepted drafts a request."""
    for seed in range(200):
        g = torch.Generator().manual_seed(seed)
        logits = 4.0 * torch.randn(num * (block + 1), vocab, generator=g)
        inputs = Inputs(
            logits,
            torch.zeros(num * block, dtype=torch.int32),
            torch.full((num,), block, dtype=torch.int32),
            temperature,
            None,
            torch.rand(num * block, generator=g, dtype=torch.float64),
            torch.rand(num, generator=g, dtype=torch.float64),
        )
        near = logits[inputs.draft_rows]
        if temperature == 0:
            ids = near.argmax(-1)
            wrong = torch.rand(ids.shape, generator=g) > 0.72
            ids[wrong] = (ids[wrong] + 1) % vocab
        else:
            near += 0.75 * torch.randn(near.shape, generator=g)
            inputs.draft_probs = near.softmax(-1)
            ids = torch.multinomial(inputs.draft_probs, 1, generator=g)[:, 0]
        inputs.draft_ids = ids.to(torch.int32)
        accepted = inputs.run("auto").num_emitted.float().mean().item() - 1
        if 2.0 <= accepted <= 3.0:
            return inputs
    raise RuntimeError("no seed gives two to three accepted drafts")


def vllm_sampler() -> Any:
    """vLLM's V1 rejection sampler with its CPU kernels, or None without vLLM."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        from vllm.platforms import current_platform
    except ImportError:
        return None
    current_platform.import_kernels()
    from vllm.v1.sample.rejection_sampler import RejectionSampler
    from vllm.v1.sample.sampler import Sampler

    current_platform.register_triton_kernel_overrides()
    return RejectionSampler(Sampler())


def vllm_metadata(inputs: Inputs) -> tuple[Any, Any]:
    """SpecDecodeMetadata and SamplingMetadata as vLLM's runner would build them."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    num = len(inputs.lengths)
    bonus = (inputs.lengths + 1).cumsum(0).to(torch.int32) - 1
    rows = inputs.draft_rows.to(torch.int32)
    spec = SpecDecodeMetadata(
        draft_token_ids=inputs.draft_ids,
        num_draft_tokens=inputs.lengths.tolist(),
        cu_num_draft_tokens=inputs.lengths.cumsum(0).to(torch.int32),
        cu_num_sampled_tokens=bonus + 1,
        target_logits_indices=rows,
        bonus_logits_indices=bonus,
        logits_indices=torch.arange(inputs.logits.shape[0], dtype=torch.int32),
    )
    greedy = inputs.temperature == 0
    nothing = torch.zeros(num)
    sampling = SamplingMetadata(
        temperature=None if greedy else torch.ones(num),
        all_greedy=greedy,
        all_random=not greedy,
        top_p=None,
        top_k=None,
        generators={},
        max_num_logprobs=None,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=nothing,
        presence_penalties=nothing,
        repetition_penalties=nothing,
        output_token_ids=[[] for _ in range(num)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    return spec, sampling


def run_cell(inputs: Inputs, sampler: Any, rounds: int) -> dict[str, float]:
    """Median microseconds of each provider for one batch."""
    assert inputs.run("native").backend == "native"
    providers: dict[str, Callable[[], object]] = {
        "reference": lambda: inputs.run("reference"),
        "native": lambda: inputs.run("auto"),
    }
    if sampler is not None:
        spec, sampling = vllm_metadata(inputs)
        providers["vllm"] = lambda: sampler(
            spec, inputs.draft_probs, inputs.logits, sampling
        )
    few = max(2, rounds // 8)  # it is only there to be compared with
    return common.time_in_turn(
        providers, {"reference": few, "native": rounds, "vllm": rounds}
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write the rows and their provenance here")
    parser.add_argument("--vocab", type=int, nargs="+", default=[49_152, 151_936])
    parser.add_argument("--reqs", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--block-size", type=int, default=7)
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--rounds", type=int, default=25, help="timings per provider")
    args = parser.parse_args()
    sampler, rows, table = vllm_sampler(), [], []
    with torch.inference_mode():
        for vocab in args.vocab:
            for num in args.reqs:
                for temperature in args.temperature:
                    inputs = make_inputs(vocab, num, args.block_size, temperature)
                    medians = run_cell(inputs, sampler, args.rounds)
                    cell = {
                        "vocab_size": vocab,
                        "num_reqs": num,
                        "block_size": args.block_size,
                        "temperature": temperature,
                    }
                    rows += [
                        {"provider": name, **cell, "median_us": round(us, 2)}
                        for name, us in medians.items()
                    ]
                    figures = [f"{us:,.0f}" for us in medians.values()]
                    ratio = medians.get("vllm", 0.0) / medians["native"]
                    figures += [f"{ratio:.1f}x"] if sampler is not None else []
                    labels = [f"{vocab}", f"{num}", f"{temperature:g}"]
                    table.append([*labels, *figures])
                    print("  ".join(table[-1]), flush=True)
    status = native_status()
    providers = ["reference", "native", *(["vllm", "vllm/native"] if sampler else [])]
    common.print_table(
        f"Rejection sampling, median microseconds ({status.isa}, {status.threads} "
        "threads)",
        ["V", "requests", "T", *providers],
        table,
    )
    common.write_json(args.json, {"rows": rows, "native": vars(status)})


if __name__ == "__main__":
    main()

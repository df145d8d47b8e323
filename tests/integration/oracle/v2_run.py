"""Runs vLLM's own DSpark (V2 runner, interpreted) and writes down what it drafted.

``python -m tests.integration.oracle.v2_run JOBS.json OUT.pt``: a list of jobs in, per
job its texts and draft blocks out. A process of its own, because the V2 runner and the
interpreter are chosen by the environment before vllm is imported.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.integration.oracle import v2_patches

v2_patches.install()

import torch  # noqa: E402


class Recorder:
    """Wraps vLLM's speculator: per drafted block, place, numbers and drafts."""

    def __init__(self, speculator: Any) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.logits: list[torch.Tensor] = []
        self.hidden = self.base = torch.empty(0)
        self.speculator = speculator
        self.inner_sample = speculator._sample_logits
        self.inner_sequential = speculator._sample_sequential
        self.inner_propose = speculator.propose
        speculator._sample_logits = self.sample_logits
        speculator._sample_sequential = self.sample_sequential
        speculator.propose = self.propose
        # vLLM computes confidences only when it trims by them (which asks for CUDA
        # graphs): the same code, switched on without the trimming.
        speculator.use_confidence_head = True

    def sample_logits(self, logits: torch.Tensor, *args: Any) -> torch.Tensor:
        self.logits.append(logits.float().clone())
        return self.inner_sample(logits, *args)

    def sample_sequential(self, num_reqs: int, hidden: torch.Tensor) -> None:
        k = self.speculator.num_speculative_steps
        rows = hidden[self.speculator.sample_indices[: num_reqs * k]]
        self.hidden = rows.view(num_reqs, k, -1).clone()
        base = self.speculator.model.compute_draft_logits(rows)
        self.base = base.view(num_reqs, k, -1).clone()
        self.logits = []
        self.inner_sequential(num_reqs, hidden)

    def propose(self, batch: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        drafts = self.inner_propose(batch, *args, **kwargs)
        if kwargs.get("dummy_run"):
            return drafts
        spec, n = self.speculator, batch.num_reqs
        num_sampled = args[4]
        anchors = spec._anchor_idx[:n]
        ids = spec.input_buffers.input_ids[anchors].tolist()
        positions = spec.input_buffers.positions[anchors].tolist()
        for i, req_id in enumerate(batch.req_ids):
            if int(num_sampled[i]) == 0:  # a prompt in parts: nobody reads these
                continue
            self.blocks.append(
                {
                    "req_id": req_id.rsplit("-", 1)[0],
                    "anchor_id": ids[i],
                    "anchor_position": positions[i],
                    "drafts": drafts[i].tolist(),
                    "hidden": self.hidden[i],
                    "base": self.base[i],
                    "logits": torch.stack([step[i] for step in self.logits]),
                    "confidence": spec.draft_token_confidence_probs[i].clone(),
                }
            )
        return drafts


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One engine: waves of prompts, one after another."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    from tests.integration.engine import engine
    from tests.integration.recorder import text_of

    with engine(
        job["target"], job["drafter"], spec=job["spec"], **job["settings"]
    ) as eng:
        runner = eng.runner
        modules = {c.__module__ for c in type(runner).__mro__}
        assert "vllm.v1.worker.gpu.model_runner" in modules, "not the V2 runner"
        recorder = Recorder(runner.speculator)
        texts = []
        for wave in job["waves"]:
            params = [
                SamplingParams(
                    ignore_eos="grammar" not in row,
                    detokenize=False,
                    structured_outputs=StructuredOutputsParams(**row["grammar"])
                    if "grammar" in row
                    else None,
                    **row["params"],
                )
                for row in wave
            ]
            outputs = eng.generate([row["prompt"] for row in wave], params)
            texts += [vars(text_of(output)) for output in outputs]
        speculator = type(runner.speculator).__module__
        sampler = runner.rejection_sampler
        tally = eng.stats()
    return {
        "texts": texts,
        "blocks": recorder.blocks,
        "speculator": speculator,
        "rejection_sampler": type(sampler).__module__,
        "verifications": getattr(sampler, "verifications", None),
        "drafts": tally.drafts,
        "accepted": tally.accepted,
    }


def main() -> None:
    jobs, out = sys.argv[1:]
    v2_patches.top_k_top_p_in_torch()
    with open(jobs) as file:
        results = [run(job) for job in json.load(file)]
    torch.save(results, out)


if __name__ == "__main__":
    main()

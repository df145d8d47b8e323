"""Makes our engine walk through recorded texts and drafts, whatever it would draw.

Two engines with different random numbers draw different tokens, so their draft
distributions can only be compared on equal prefixes. Here the emitted tokens and the
drafts are forced to a transcript. Drafts are forced through the uniforms: for each
position the middle of the wanted token's interval of the cumulative distribution. So
the real loop runs, sees the wanted prefix, and must draw the wanted tokens itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.integration.recorder import user_id


@dataclass(frozen=True)
class Transcript:
    """A request's text and its rounds: anchor position → drafts."""

    tokens: list[int]
    rounds: dict[int, list[int]]

    def emitted(self, known: int, num_drafts: int) -> list[int]:
        """What the step after ``known`` tokens put out."""
        later = [p for p in self.rounds if p >= known]
        end = min(later) + 1 if later else len(self.tokens)
        return self.tokens[known : min(end, known + num_drafts + 1)] or [0]


@contextmanager
def forced(runner: Any, transcripts: dict[str, Transcript]) -> Iterator[None]:
    """Force the runner's texts and drafts inside the block, by request id.

    Enter it inside ``recording``, not around it."""
    from vllm.v1.outputs import SamplerOutput

    from vllm_dspark.integration import proposer as module

    proposer = runner.drafter
    real_verify, real_sample = runner._sample, proposer._sample
    real_draft = module.draft_sequential
    wanted: list[list[int]] = []

    def transcript(row: int) -> Transcript:
        return transcripts[user_id(runner.input_batch.req_ids[row])]

    def emit(logits: Tensor, metadata: Any) -> Any:
        real_verify(logits, metadata)
        n = runner.input_batch.num_reqs
        drafts = [0] * n if metadata is None else metadata.num_draft_tokens
        known = runner.input_batch.num_tokens_no_spec[:n].tolist()
        rows = [transcript(i).emitted(known[i], drafts[i]) for i in range(n)]
        width = max(drafts) + 1
        padded = [row + [-1] * (width - len(row)) for row in rows]
        tokens = torch.tensor(padded, dtype=torch.int32)
        return SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)

    def sample(hidden: Tensor, anchors: Any, *args: Any) -> Any:
        rows, positions = args[-1]
        wanted[:] = [
            # No round there: past the text's end, nobody reads these.
            transcript(row).rounds.get(int(p), [-1] * hidden.shape[1])
            for row, p in zip(rows.tolist(), positions, strict=True)
        ]
        return real_sample(hidden, anchors, *args)

    def draft(base: Tensor, *args: Any, uniforms: Tensor | None, **keys: Any) -> Any:
        if uniforms is None:
            return real_draft(base, *args, uniforms=None, **keys)
        uniforms = torch.full(uniforms.shape, 0.5, dtype=torch.float64)
        for k in range(base.shape[1]):
            out = real_draft(base, *args, uniforms=uniforms, **keys)
            for i, tokens in enumerate(wanted):
                uniforms[i, k] = _middle(out, i, k, tokens[k])
        out = real_draft(base, *args, uniforms=uniforms, **keys)
        for i, tokens in enumerate(wanted):
            assert tokens[0] == -1 or out.token_ids[i].tolist() == tokens
        return out

    with (
        mock.patch.object(runner, "_sample", emit),
        mock.patch.object(proposer, "_sample", sample),
        mock.patch.object(module, "draft_sequential", draft),
    ):
        yield


def _middle(out: Any, i: int, k: int, token: int) -> float:
    """A uniform number that draws ``token`` at position k of request i."""
    probs = out.draft_probs[i, k].double()
    ids = torch.arange(len(probs))
    if out.draft_support is not None:
        ids = out.draft_support.expand(*out.draft_probs.shape)[i, k].long()
    probs, order = probs[ids.argsort()], ids.sort().values
    column = int(torch.searchsorted(order, token))
    if column == len(order) or int(order[column]) != token:
        return 0.5
    before = probs[:column].sum() + probs[column] / 2
    return float(before / probs.sum())

"""Records every draft step of an in-process engine, and drives engines step by step.

Recorded is what vLLM's side saw: anchors, positions, the target's hidden states as they
were handed to the proposer, and what came out of backbone, LM head and sampling loop.
``tests.integration.oracle.history`` recomputes the same from the text alone.
"""

from __future__ import annotations

import random
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.tiny import FIRST_TEXT


@dataclass(frozen=True)
class Text:
    """A finished request: tokens are prompt and output."""

    req_id: str
    tokens: list[int]
    prompt_len: int
    cached: int = 0  # prompt tokens found in the prefix cache

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_len :]


@dataclass(frozen=True)
class Block:
    """One drafted block, as the proposer returned it.

    Shape: hidden [K, d]; base [K, Vd]; drafts [K]; probs [K, S] or None; support [S]
    or [K, S] or None; confidence [K] or None.
    """

    req_id: str
    anchor_id: int
    anchor_position: int
    hidden: Tensor
    base: Tensor
    drafts: list[int]
    probs: Tensor | None
    support: Tensor | None
    confidence: Tensor | None
    batch: int  # requests in the same step


@dataclass
class Recording:
    """Everything recorded since the start (or since ``clear``)."""

    blocks: list[Block] = field(default_factory=list)
    # Request → position → concatenated hidden states that became its context K/V.
    features: dict[str, dict[int, Tensor]] = field(default_factory=dict)
    # Rows of target steps whose drafts were rejected (they must leave no context).
    rejected_rows: int = 0
    # Steps by what they held: (requests in mid-prefill, requests that drafted).
    steps: list[tuple[int, int]] = field(default_factory=list)

    def clear(self) -> None:
        self.blocks.clear()
        self.features.clear()
        self.steps.clear()
        self.rejected_rows = 0

    def of(self, text: Text) -> list[Block]:
        """Blocks of a text. A step that ends a request may emit, and draft from,
        tokens past its end: those anchors are nobody's and left out."""
        end = len(text.tokens)
        mine = [b for b in self.blocks if user_id(b.req_id) == text.req_id]
        return [b for b in mine if b.anchor_position < end]

    def features_of(self, req_id: str) -> dict[int, Tensor]:
        found = [f for r, f in self.features.items() if user_id(r) == req_id]
        assert len(found) == 1, f"{len(found)} engine requests named {req_id}"
        return found[0]


@contextmanager
def recording(runner: Any) -> Iterator[Recording]:
    """Record the draft steps of a runner inside the block."""
    proposer = runner.drafter
    record = Recording()
    kind = type(proposer)

    def step(self: Any, tokens: Any, features: list[Tensor], *args: Any) -> Any:
        req_ids = list(runner.input_batch.req_ids)
        positions = args[0].tolist()
        joined = torch.cat(features, dim=-1)
        lengths = (tokens.query_start[1:] - tokens.query_start[:-1]).tolist()
        for i, req_id in enumerate(req_ids):
            start, valid = int(tokens.query_start[i]), int(tokens.num_valid[i])
            rows = record.features.setdefault(req_id, {})
            for row in range(start, start + valid):
                rows[positions[row]] = joined[row].clone()
            record.rejected_rows += lengths[i] - valid
        drafted = kind.step(self, tokens, features, *args)
        num_drafting = 0 if drafted is None else len(drafted.rows)
        record.steps.append((int((~tokens.drafting).sum()), num_drafting))
        return drafted

    def sample(self: Any, hidden: Tensor, anchors: Any, *args: Any) -> Any:
        n, k, width = hidden.shape
        base = self.model.base_logits(hidden.reshape(n * k, width)).view(n, k, -1)
        kept, base = hidden.clone(), base.clone()
        block = kind._sample(self, hidden, anchors, *args)
        rows, positions = args[-1]
        req_ids = list(runner.input_batch.req_ids)
        support = block.draft_support
        if support is not None:
            support = support.expand(n, k, -1)
        for i, row in enumerate(rows.tolist()):
            record.blocks.append(
                Block(
                    req_id=req_ids[row],
                    anchor_id=int(anchors[i]),
                    anchor_position=int(positions[i]),
                    hidden=kept[i],
                    base=base[i],
                    drafts=block.token_ids[i].tolist(),
                    probs=_row(block.draft_probs, i),
                    support=_row(support, i),
                    confidence=_row(block.confidence, i),
                    batch=len(req_ids),
                )
            )
        return block

    proposer.step = types.MethodType(step, proposer)
    proposer._sample = types.MethodType(sample, proposer)
    try:
        yield record
    finally:
        del proposer.step, proposer._sample


def _row(tensor: Tensor | None, i: int) -> Tensor | None:
    return None if tensor is None else tensor[i].clone()


def user_id(req_id: str) -> str:
    """The id a request was added with; the engine appends a random suffix."""
    return req_id.rsplit("-", 1)[0]


def text_of(output: Any) -> Text:
    """From vLLM's (cumulative) request output."""
    prompt = list(output.prompt_token_ids)
    tokens = prompt + list(output.outputs[0].token_ids)
    return Text(
        output.request_id, tokens, len(prompt), int(output.num_cached_tokens or 0)
    )


def prompt(length: int, seed: int = 0, vocab_size: int = 128) -> list[int]:
    """Random text tokens."""
    source = random.Random(1000 * seed + length)
    return [source.randrange(FIRST_TEXT, vocab_size) for _ in range(length)]


def greedy(max_tokens: int) -> Any:
    """Greedy sampling parameters that run to their length."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False
    )


def drive(
    engine: Any,
    arrivals: Sequence[tuple[int, list[int], Any]],
    prefix: str = "r",
    each_step: Callable[[int], None] | None = None,
) -> list[Text]:
    """Step the engine while requests join at given steps.

    Args:
        arrivals: (step, prompt, sampling parameters) per request.
        prefix: of the request ids.
        each_step: called after each step with its number.

    Returns:
        Texts of the finished requests, in the order of ``arrivals``; an aborted
        request has none.
    """
    llm_engine = engine.llm.llm_engine
    waiting = sorted(enumerate(arrivals), key=lambda row: row[1][0])
    texts: dict[str, Text] = {}
    step = 0
    while waiting or llm_engine.has_unfinished_requests():
        while waiting and waiting[0][1][0] <= step:
            i, (_, prompt, params) = waiting.pop(0)
            llm_engine.add_request(f"{prefix}{i}", {"prompt_token_ids": prompt}, params)
        for output in llm_engine.step():
            if output.finished:
                texts[output.request_id] = text_of(output)
        if each_step is not None:
            each_step(step)
        step += 1
    ids = [f"{prefix}{i}" for i in range(len(arrivals))]
    return [texts[i] for i in ids if i in texts]

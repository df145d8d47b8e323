"""Recomputes recorded draft blocks from the token history alone, and compares.

Hugging Face's target in eager attention gives the features, the plain-torch drafter of
``vllm_dspark/model`` the rest. They share weights with the engine and nothing else: no
K/V cache, no batch, no scheduler, no slot or position arithmetic.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tests.integration.recorder import Block, Recording, Text
from tests.tiny import load_target
from vllm_dspark.model.checkpoint import load_drafter

# float32 with other summation orders: 1e-6 is what is seen, a wrong row, layer or
# position gives 1e-2 and more (test_a_bug_would_be_noticed).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Reference:
    """What the blocks of one text should be.

    Shape: features [T, m·d]; hidden [n, K, d]; base, logits [n, K, Vd]; confidence
    [n, K] or None; n blocks.
    """

    features: Tensor
    hidden: Tensor
    base: Tensor
    logits: Tensor
    confidence: Tensor | None


@dataclass
class Tally:
    """What has been compared, and the largest relative differences."""

    blocks: int = 0
    accepted: int = 0
    features: int = 0
    largest: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, actual: Tensor, expected: Tensor) -> None:
        error = relative(actual, expected)
        self.largest[name] = max(self.largest.get(name, 0.0), error)
        assert error <= TOLERANCE, f"{name} differs by {error:.2e} (relative)"

    @property
    def tau(self) -> float:
        return 1 + self.accepted / self.blocks


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    return float((actual - expected).abs().max() / expected.abs().max())


class Oracle:
    """Hugging Face's target and the plain-torch drafter of two folders."""

    def __init__(self, target: Path, drafter: Path) -> None:
        self.target = load_target(target)
        self.drafter = load_drafter(
            drafter,
            target_embeddings=self.target.get_input_embeddings().weight,
            target_lm_head=self.target.get_output_embeddings().weight,
        )

    @torch.inference_mode()
    def target_run(
        self, tokens: Sequence[int], shift: int = 0
    ) -> tuple[Tensor, list[int]]:
        """Features [T, m·d] of a whole text, and the greedy successor of each token."""
        out = self.target(torch.tensor([tokens]), output_hidden_states=True)
        taps = self.drafter.config.target_layer_ids
        features = [out.hidden_states[i + 1 + shift][0] for i in taps]
        return torch.cat(features, dim=-1), out.logits[0].argmax(-1).tolist()

    @torch.inference_mode()
    def recompute(
        self,
        tokens: Sequence[int],
        blocks: Sequence[Block],
        features: Tensor,
        position: int = 0,
        forget: int | None = None,
    ) -> Reference:
        """Redo blocks of one text; of ``blocks`` only places and drafts are used.

        Args:
            features: of the whole text.
            position: added to the anchors' positions: a mistake, to see its size.
            forget: a context position whose row is lost: likewise.
        """
        positions = torch.arange(len(tokens))[None]
        anchors = torch.tensor([b.anchor_position for b in blocks])
        context = self.drafter.context_kv(features[None], positions)
        if forget is not None:
            seen = positions.masked_fill(positions == forget, -1)
            context = dataclasses.replace(context, positions=seen)
        ids = torch.tensor(tokens)[anchors]
        k = len(blocks[0].drafts)
        hidden, base = self.drafter.forward_block(ids, anchors + position, context, k)
        drafts = torch.tensor([b.drafts for b in blocks])
        previous = torch.cat([ids[:, None], drafts[:, :-1]], dim=1)
        logits, confidence = self.drafter.teacher_forced(hidden, base, previous)
        if confidence is not None:
            confidence = confidence.sigmoid()
        return Reference(features, hidden, base, logits, confidence)

    def greedy_drafts(self, logits: Tensor) -> list[list[int]]:
        """Argmax over the draft vocabulary, as target ids."""
        best, mapping = logits.argmax(-1), self.drafter.draft_to_target
        return (best if mapping is None else mapping[best]).tolist()

    def check(
        self,
        record: Recording,
        texts: Iterable[Text],
        *,
        every_round: bool = True,
        greedy: bool = True,
    ) -> Tally:
        """Everything recorded for these texts is what it should be.

        Args:
            every_round: each round must have drafted a whole block (not so after a
                preemption or at the end of the context).
            greedy: the texts and drafts are greedy.
        """
        tally = Tally()
        for text in texts:
            blocks = record.of(text)
            features, best = self.target_run(text.tokens)
            if greedy:  # lossless: the text is the target's own
                assert text.output == best[text.prompt_len - 1 : -1]
            for block in blocks:
                assert block.anchor_id == text.tokens[block.anchor_position]
                tally.accepted += accepted(text, block)
            if every_round:
                assert [b.anchor_position for b in blocks] == rounds(text, blocks)
            self._check_features(tally, record, text, features)
            for k in {len(b.drafts) for b in blocks}:
                alike = [b for b in blocks if len(b.drafts) == k]
                self._check_blocks(tally, text, alike, features, greedy)
        return tally

    def _check_blocks(
        self,
        tally: Tally,
        text: Text,
        blocks: Sequence[Block],
        features: Tensor,
        greedy: bool,
    ) -> None:
        """Blocks of one length."""
        expected = self.recompute(text.tokens, blocks, features)
        tally.blocks += len(blocks)
        tally.add("hidden", torch.stack([b.hidden for b in blocks]), expected.hidden)
        tally.add("base", torch.stack([b.base for b in blocks]), expected.base)
        if greedy:
            drafts = self.greedy_drafts(expected.logits)
            assert [b.drafts for b in blocks] == drafts
        if expected.confidence is not None:
            confidence = torch.stack([b.confidence for b in blocks])
            tally.add("confidence", confidence, expected.confidence)
        else:
            assert all(b.confidence is None for b in blocks)

    def _check_features(
        self, tally: Tally, record: Recording, text: Text, features: Tensor
    ) -> None:
        """Every position up to the last anchor got its context once, the right one."""
        rows = record.features_of(text.req_id)
        at = [p for p in sorted(rows) if p < len(text.tokens)]
        assert at == list(range(text.cached, at[-1] + 1))
        assert at[-1] >= len(text.tokens) - 2
        tally.features += len(at)
        tally.add("features", torch.stack([rows[p] for p in at]), features[at])


def accepted(text: Text, block: Block) -> int:
    """Drafts of a block that became text."""
    after = text.tokens[block.anchor_position + 1 :]
    n = 0
    while n < min(len(after), len(block.drafts)) and block.drafts[n] == after[n]:
        n += 1
    return n


def rounds(text: Text, blocks: Sequence[Block]) -> list[int]:
    """Anchor positions that must have been drafted from, given what was drafted."""
    by_position = {b.anchor_position: b for b in blocks}
    position, found = text.prompt_len, []
    while position < len(text.tokens):
        found.append(position)
        assert position in by_position, f"nothing was drafted at position {position}"
        position += accepted(text, by_position[position]) + 1
    return found

"""What was kept and what was dropped, item after item, and when a shard is written.

Items are taken in the order of their numbers, so what is a duplicate of what does not
depend on which answer came first. A shard completes a range of items; the next run
goes on after the last of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_dspark.train.plan import Item
from vllm_dspark.train.prompts import SELF, Ids
from vllm_dspark.train.shards import read_shard
from vllm_dspark.train.tokens import Sample, TokenWriter

# So many items in a row without anything to keep will not get better.
HOPELESS = 1024


@dataclass(frozen=True, slots=True)
class Answer:
    """Token ids as the target emitted them, and whether it ended by itself."""

    ids: Ids
    finished: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an item: a prompt with its answer, or why there is none."""

    item: Item
    prompt: Ids = ()
    answer: Answer | None = None
    dropped: str = ""


class Ledger:
    """Takes outcomes and fills a token folder, from where the folder ends.

    Args:
        writer: the folder.
        min_response_tokens: shorter answers are dropped.
        items_per_shard: what is at most lost when killed.

    Attributes:
        next_item: number of the first item that was not taken yet.
        samples: kept, those of earlier runs included.
        response_tokens: of these samples.
        dropped: how many, by reason.
    """

    def __init__(
        self, writer: TokenWriter, min_response_tokens: int, items_per_shard: int
    ) -> None:
        self._writer = writer
        self._min_response_tokens = min_response_tokens
        self._items_per_shard = items_per_shard
        shards, counts = writer.manifest.shards, writer.manifest.counts
        self.samples = sum(s.samples for s in shards)
        self.response_tokens = sum(s.response_tokens for s in shards)
        self.next_item = max((s.items[1] for s in shards if s.items), default=0)
        self.dropped = Counter(counts.get("dropped", {}))
        self._by_temperature = Counter(counts.get("temperature", {}))
        self._by_source = Counter(counts.get("source", {}))
        self._truncated = int(counts.get("truncated", 0))
        self._first = self._last_kept = self.next_item
        self._buffer: list[Sample] = []
        self._seen: set[bytes] = set()
        self._seen_prompts: set[bytes] = set()
        self._read_hashes()

    def _read_hashes(self) -> None:
        manifest = self._writer.manifest
        for shard in manifest.shards:
            arrays = read_shard(self._writer.folder, shard, manifest)
            at = 0
            columns = (arrays[k] for k in ("prompt_len", "response_len", "source"))
            for prompt_len, response_len, source in zip(*columns, strict=True):
                middle, end = at + prompt_len, at + prompt_len + response_len
                prompt = arrays["tokens"][at:middle].tolist()
                self._seen.add(_digest(prompt, arrays["tokens"][middle:end].tolist()))
                if manifest.sources[source] == SELF:
                    self._seen_prompts.add(_digest(prompt))
                at = end

    def knows_prompt(self, prompt: Ids) -> bool:
        """Whether a sample with this prompt, made by the target, was kept."""
        return _digest(prompt) in self._seen_prompts

    def take(self, outcome: Outcome) -> None:
        """Keep or drop the outcome of `next_item`; writes a shard when one is full.

        Raises:
            ValueError: nothing was kept for long, or the shard cannot be written.
        """
        assert outcome.item.number == self.next_item
        reason = self._reason_to_drop(outcome)
        if reason:
            self.dropped[reason] += 1
        else:
            self._keep(outcome)
        self.next_item += 1
        if self.next_item - self._first >= self._items_per_shard:
            self.flush()
        if self.next_item - self._last_kept >= HOPELESS:
            raise ValueError(
                f"none of the last {HOPELESS} answers could be kept (dropped so far: "
                f"{dict(self.dropped)}); other prompts, temperatures or lengths are "
                "needed"
            )

    def _reason_to_drop(self, outcome: Outcome) -> str:
        if outcome.answer is None:
            return outcome.dropped
        # First, as who asks looks for it before there is an answer: the reason must not
        # depend on which answer came first.
        if outcome.item.prompt is None and self.knows_prompt(outcome.prompt):
            return "duplicate prompt"
        if len(outcome.answer.ids) < self._min_response_tokens:
            return "short response"
        known = _digest(outcome.prompt, outcome.answer.ids) in self._seen
        return "duplicate sample" if known else ""

    def _keep(self, outcome: Outcome) -> None:
        item, answer = outcome.item, outcome.answer
        assert answer is not None
        source = self._writer.manifest.sources.index(item.source)
        sample = Sample(outcome.prompt, answer.ids, item.temperature, source)
        self._buffer.append(sample)
        self._seen.add(_digest(sample.prompt, sample.response))
        if item.prompt is None:
            self._seen_prompts.add(_digest(sample.prompt))
        self.samples += 1
        self.response_tokens += len(answer.ids)
        self._truncated += not answer.finished
        self._by_temperature[f"{item.temperature:g}"] += 1
        self._by_source[item.source] += 1
        self._last_kept = item.number + 1

    def counts(self) -> dict[str, Any]:
        """What the folder holds and what was dropped, for the manifest."""
        return {
            "items": self.next_item,
            "samples": self.samples,
            "response_tokens": self.response_tokens,
            "truncated": self._truncated,
            "temperature": dict(self._by_temperature),
            "source": dict(self._by_source),
            "dropped": dict(self.dropped),
        }

    def flush(self) -> None:
        """Write what was taken since the last shard, if anything.

        Raises:
            ValueError: as `TokenWriter.append`.
        """
        if self.next_item == self._first:
            return
        # Forgotten first: if writing is interrupted, nothing may write it again.
        samples, self._buffer = self._buffer, []
        items, self._first = (self._first, self.next_item), self.next_item
        self._writer.append(samples, items=items, counts=self.counts())


def _digest(*parts: Sequence[int]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.array(part, np.int32).tobytes())
    return digest.digest()

"""Training text for a drafter, by the million tokens, on a GPU without vLLM.

    python benchmarks/gpu_text.py --target T --prompts F.jsonl --out DATA --seconds 90

Does what `vllm-dspark synthesize` does, for a Llama-like target on one GPU: a static
decoder (`_gpu_decode`) answers prompts of the file at several temperatures, and user
turns that the target writes itself, freely or from the first words of a prompt of the
file. The result is a token folder that `vllm-dspark train` reads.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _bench_common as common
import numpy as np
from _gpu_decode import Decoder, Request

from vllm_dspark import provenance
from vllm_dspark.model.target import identify_target
from vllm_dspark.train.prompts import Renderer, read_prompts
from vllm_dspark.train.shards import Sample
from vllm_dspark.train.tokens import TokenWriter

# Shares of what is asked.
SHARES = {"file": 0.35, "begun": 0.45, "self": 0.20}
TEMPERATURES = {
    "first": {0.0: 1.0},  # a prompt of the file, the first time
    "file": {0.3: 0.25, 0.6: 0.35, 1.0: 0.40},
    "begun": {0.0: 0.5, 0.6: 0.25, 1.0: 0.25},
    "self": {0.0: 0.5, 0.6: 0.25, 1.0: 0.25},
}
MOST_WORDS = 9  # a turn begins with fewer tokens of a prompt
MAX_ANSWER, MAX_TURN, MIN_TURN, MIN_ANSWER = 256, 120, 4, 4
SAMPLES_PER_SHARD = 8192


class Questions:
    """Requests without end, until the clock says so; answers become samples.

    Args:
        renderer: of the target.
        prompts: (ids, source) of the file.
        words: first words of the file's prompts, and their source.
        deadline: of `time.monotonic`; no new question after it.
        length: of a slot.
    """

    def __init__(
        self,
        renderer: Renderer,
        prompts: list[tuple[tuple[int, ...], str]],
        words: list[tuple[tuple[int, ...], str]],
        deadline: float,
        length: int,
    ) -> None:
        self.prompts = [p for p in prompts if len(p[0]) <= length - MAX_ANSWER // 2]
        self.words, self.deadline, self.length = words, deadline, length
        self.rng = np.random.default_rng(0)
        self.header, stop = renderer.user_header()
        if not stop.ids:
            raise ValueError("the template has no token that ends a user's turn")
        self.stop = stop.ids[0]
        # What follows the user's words, up to the answer.
        whole = renderer.messages([{"role": "user", "content": "x"}])
        last = len(whole) - 1 - whole[::-1].index(self.stop)
        self.after = whole[last:]
        sources = sorted({s for _, s in prompts})
        self.sources = ["self", *sources, *(f"begun {s}" for s in sources)]
        self.waiting: deque[Request] = deque()
        self.asked: set[int] = set()
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Request]:
        while True:
            if self.waiting:
                yield self.waiting.popleft()
            elif time.monotonic() > self.deadline:
                return
            else:
                yield self._new()

    def _new(self) -> Request:
        kind = str(self.rng.choice(list(SHARES), p=list(SHARES.values())))
        if kind == "file":
            row = int(self.rng.integers(len(self.prompts)))
            ids, source = self.prompts[row]
            first = row not in self.asked
            self.asked.add(row)
            return self._answer(ids, source, "first" if first else "file")
        if kind == "self":
            return self._turn((), "self", kind)
        words, source = self.words[int(self.rng.integers(len(self.words)))]
        some = words[: int(self.rng.integers(2, MOST_WORDS))]
        return self._turn(some, f"begun {source}", kind)

    def _turn(self, words: tuple[int, ...], source: str, kind: str) -> Request:
        ids = (*self.header, *words)
        return Request(ids, MAX_TURN, 1.0, self.stop, ("turn", words, source, kind))

    def _answer(self, ids: tuple[int, ...], source: str, kind: str) -> Request:
        mix = TEMPERATURES[kind]
        temperature = float(self.rng.choice(list(mix), p=list(mix.values())))
        return Request(ids, MAX_ANSWER, temperature, -1, ("answer", source))

    def take(self, request: Request, tokens: list[int], ended: bool) -> Sample | None:
        """A sample, or None: a turn (its answer is asked for next) or of no use."""
        what, *rest = request.tag
        if what == "answer":
            if len(tokens) < MIN_ANSWER:
                self.counts["short answer"] += 1
                return None
            index = self.sources.index(rest[0])
            return Sample(request.prompt, tokens, request.temperature, index)
        words, source, kind = rest
        turn = (*words, *tokens[:-1])
        if not ended or tokens[-1] != self.stop or len(turn) < MIN_TURN:
            self.counts["unused turn"] += 1
        else:
            ids = (*self.header, *turn, *self.after)
            if len(ids) <= self.length - MAX_ANSWER // 2:
                self.waiting.append(self._answer(ids, source, kind))
        return None


def load(folder: Path, device: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    kind = torch.bfloat16 if device == "cuda" else torch.float32
    target = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return target.eval().requires_grad_(False).to(device), tokenizer


def first_words(file: Path, tokenizer: Any) -> list[tuple[tuple[int, ...], str]]:
    found = []
    for row in common.read_rows(file):
        text = row["messages"][0]["content"]
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found.append((tuple(ids[:MOST_WORDS]), row["dataset"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--target", type=Path, required=True)
    add("--prompts", type=Path, required=True)
    add("--out", type=Path, required=True)
    add("--seconds", type=float, default=60)
    add("--slots", type=int, default=2048)
    add("--length", type=int, default=448)
    add("--device", default="cuda")
    a = parser.parse_args()
    target, tokenizer = load(a.target, a.device)
    renderer = Renderer(tokenizer)
    found = read_prompts([a.prompts], renderer, a.length)
    ends = target.generation_config.eos_token_id or tokenizer.eos_token_id
    ends = [ends] if isinstance(ends, int) else list(ends)
    decoder = Decoder(target, a.slots, a.length, ends)
    decoder.capture()
    start = time.monotonic()
    questions = Questions(
        renderer,
        [(p.ids, p.source) for p in found.prompts],
        first_words(a.prompts, tokenizer),
        start + a.seconds,
        a.length,
    )
    settings = {
        "shares": SHARES,
        "temperatures": {
            k: list(map(list, v.items())) for k, v in TEMPERATURES.items()
        },
        "max_answer": MAX_ANSWER,
    }
    kept, seen, tokens = [], set(), 0
    with TokenWriter(
        a.out,
        target=identify_target(str(a.target)),
        sampling=settings,
        sources=questions.sources,
        provenance=provenance.collect(),
    ) as writer:
        for request, answer, ended in decoder.run(iter(questions)):
            tokens += len(answer)
            sample = questions.take(request, answer, ended)
            if sample is None:
                continue
            key = hash((sample.prompt, tuple(sample.response)))
            if key in seen:
                questions.counts["duplicate"] += 1
                continue
            seen.add(key)
            kept.append(sample)
            if len(kept) == SAMPLES_PER_SHARD:
                writer.append(kept, counts=dict(questions.counts))
                kept = []
                took = time.monotonic() - start
                print(f"{took:.0f} s: {tokens / took:,.0f} tokens/s", flush=True)
        writer.append(kept, counts=dict(questions.counts))
        shards = writer.manifest.shards
    print(
        f"{sum(s.samples for s in shards)} samples, "
        f"{sum(s.response_tokens for s in shards)} response tokens, "
        f"{time.monotonic() - start:.0f} s; {dict(questions.counts)}"
    )


if __name__ == "__main__":
    main()

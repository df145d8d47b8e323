"""What clients ask of the simulated server: prompts, answers, and when.

A request's text (its dataset, the tokens of its prompt and answer) depends on the seed
and its number alone, so that every arm answers the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from _sim_acceptance import Acceptance


@dataclass(frozen=True)
class Workload:
    """What requests are like.

    Args:
        prompt_tokens: mean of the prompts, for datasets whose lengths are not known.
        output_tokens: mean of an answer.
        spread: prompts and answers have 1 − this to 1 + this of those tokens.
        prefill: False where a prompt is in the cache but for its last token: for cost
            tables that have the prefill in them.
    """

    prompt_tokens: int = 128
    output_tokens: int = 128
    spread: float = 0.5
    prefill: bool = True

    def __post_init__(self) -> None:
        if min(self.prompt_tokens, self.output_tokens) < 2 or not 0 <= self.spread < 1:
            raise ValueError(f"{self}: 2 tokens at least, a spread in 0 to below 1")


@dataclass(slots=True)
class Request:
    """One request and how far it is.

    Args:
        id: its name.
        dataset: where its text is from.
        prompt: tokens of its prompt that are not in the K/V cache yet.
        output: tokens it still has to emit.
        arrival: when the engine knows of it; sent: when the client sent it.
        context: its tokens in the K/V cache.
        first, last: when its first and last token came; emitted: tokens so far.
        drafts: drafts that wait for verification, alive of which would be accepted.
        confidence: of those.
        number, offset: for `Drafter.draw`.
        owed: its tokens whose context K/V of the drafter is not written yet.
    """

    id: str
    dataset: str
    prompt: int
    output: int
    arrival: float
    context: int = 0
    first: float = 0.0
    last: float = 0.0
    emitted: int = 0
    drafts: int = 0
    alive: int = 0
    confidence: np.ndarray | None = None
    number: int = 0
    offset: float = 0.0
    sent: float = 0.0
    owed: int = 0


@dataclass
class Load:
    """An endless sequence of requests, or a counted one, closed or open.

    Args:
        acceptance: whose datasets take turns.
        work: lengths.
        clients: of a closed loop: each has one request at a time.
        rate: of an open loop, requests a second (Poisson); `clients` is not used then.
        count: requests in all; None for no end.
        turnaround: seconds from a client's asking to the engine's knowing; the server
            takes one request after the other, so that many at once trickle in.
        start: number of the first request, where a load goes on from another.
        seed: of everything.
    """

    acceptance: Acceptance
    work: Workload
    clients: int = 1
    rate: float | None = None
    count: int | None = None
    turnaround: float = 0.005
    start: int = 0
    seed: int = 0
    sent: int = 0
    _arrival: float = 0.0
    _ready: float = 0.0
    _waiting: list[Request] = field(default_factory=list)

    def begin(self, now: float) -> None:
        """Send what is there at the start."""
        self._arrival = now
        for _ in range(self.clients if self.rate is None else 1):
            self._send(now)

    def _send(self, at: float) -> None:
        if self.count is not None and self.sent >= self.count:
            return
        number = self.start + self.sent
        self.sent += 1
        self._ready = max(self._ready, at) + self.turnaround
        self._waiting.append(replace(self.text(number), arrival=self._ready, sent=at))

    def answered(self, now: float) -> None:
        """An answer has been read: a client of a closed loop asks again."""
        if self.rate is None:
            self._send(now)

    def arrived(self, now: float) -> list[Request]:
        """Requests that have come by now; they are the caller's from now on."""
        found = []
        while self._waiting and self._waiting[0].arrival <= now:
            found.append(self._waiting.pop(0))
            if self.rate is not None:
                self._arrival += self._gap(self.sent)
                self._send(self._arrival)
        return found

    def next_arrival(self) -> float | None:
        """When the next one comes; None if none will."""
        return self._waiting[0].arrival if self._waiting else None

    def _gap(self, number: int) -> float:
        assert self.rate is not None
        random = np.random.default_rng((self.seed, number, 1))
        return float(random.exponential(1 / self.rate))

    def text(self, number: int) -> Request:
        """The request of a number."""
        names = sorted(self.acceptance.datasets)
        block, place = divmod(number, len(names))
        order = np.random.default_rng((self.seed, block, 2)).permutation(len(names))
        dataset = names[order[place]]
        random = np.random.default_rng((self.seed, number, 3))
        lengths = self.acceptance.datasets[dataset].prompt_tokens
        if lengths:
            prompt = int(lengths[random.integers(len(lengths))])
        else:
            prompt = self._spread(self.work.prompt_tokens, random.random())
        output = self._spread(self.work.output_tokens, random.random())
        cached = 0 if self.work.prefill else prompt - 1
        return Request(f"r{number}", dataset, prompt - cached, output, 0.0, cached)

    def _spread(self, mean: int, at: float) -> int:
        low, high = mean * (1 - self.work.spread), mean * (1 + self.work.spread)
        return max(1, round(low + at * (high - low)))


def percentile(values: Sequence[float], share: float) -> float | None:
    """A percentile, None of nothing."""
    return float(np.quantile(values, share)) if len(values) else None

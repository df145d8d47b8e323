"""Measure one arm of the demo: stream prompts through a running server.

An arm is a server with or without speculation. Each prompt is asked several times
and the median time counts; the speculation counters are the difference of
``/metrics`` before and after. Knows nothing of how a server is started.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_dspark.cli.server import Metrics, Server, total

_DRAFTS = "vllm:spec_decode_num_drafts_total"
_DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
_ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
_PER_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"

# Called with the text of a chunk and the number of tokens it brought.
Printer = Callable[[str, int], None]


@dataclass(slots=True)
class Answer:
    """One answer to one prompt, the first time it was asked."""

    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    # Seconds of each time the prompt was asked, from sending to the last token.
    seconds: list[float]

    @property
    def tokens_per_second(self) -> float:
        """Output tokens by the median time, prefill included."""
        return len(self.token_ids) / statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Speculation:
    """What the server counted: rounds, drafts, and acceptance by position."""

    rounds: int
    draft_tokens: int
    accepted: int
    per_position: tuple[int, ...]

    @property
    def accepted_length(self) -> float | None:
        """τ: tokens per decoding round, the target's own token included."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def acceptance_per_position(self) -> list[float]:
        """Share of rounds in which draft k was accepted, k = 1, 2, …"""
        return [n / self.rounds for n in self.per_position] if self.rounds else []


@dataclass(slots=True)
class Arm:
    """Everything measured with one server."""

    name: str
    start_seconds: float
    answers: dict[str, Answer] = field(default_factory=dict)
    speculation: Speculation | None = None

    @property
    def tokens_per_second(self) -> float:
        """Geometric mean over the prompts."""
        return geometric_mean([a.tokens_per_second for a in self.answers.values()])


def geometric_mean(values: list[float]) -> float:
    """The mean that treats twice as fast and half as fast alike."""
    return math.exp(sum(map(math.log, values)) / len(values))


def run_arm(
    arm: Arm,
    server: Server,
    prompts: Mapping[str, str],
    printer: Callable[[str], Printer],
    max_tokens: int,
    repeats: int,
) -> None:
    """Ask every prompt ``repeats`` times and fill in ``arm``.

    Args:
        arm: receives answers and speculation counters.
        server: ready and idle.
        prompts: short name to user message.
        printer: called with a prompt's name before its first answer; what it
            returns receives that answer's chunks as they arrive.
        max_tokens: tokens an answer may have.
        repeats: how often each prompt is asked.
    """
    client = connect(server)
    # The first requests of a server are slower (threads, caches); not measured.
    for prompt in prompts.values():
        ask(client, _user(prompt), 8, lambda text, tokens: None)
    before = server.metrics()
    for repeat in range(repeats):
        for name, prompt in prompts.items():
            show = printer(name) if repeat == 0 else lambda text, tokens: None
            answer = ask(client, _user(prompt), max_tokens, show)
            server.check_alive()
            if repeat == 0:
                arm.answers[name] = answer
            else:
                arm.answers[name].seconds += answer.seconds
    arm.speculation = speculation_between(before, server.metrics())


def connect(server: Server) -> Any:
    """An openai client of the server."""
    from openai import OpenAI

    # No retries: a second try would hide a failure and spoil the time.
    return OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
    )


def _user(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def ask(client: Any, messages: list[Any], max_tokens: int, show: Printer) -> Answer:
    """Stream one greedy answer to a conversation."""
    model = client.models.list().data[0].id
    text = ""
    prompt_ids: list[int] = []
    token_ids: list[int] = []
    start = end = time.perf_counter()
    stream = client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        # Token ids, not only text: equality is judged on them.
        extra_body={"return_token_ids": True},
    )
    for chunk in stream:
        prompt_ids += getattr(chunk, "prompt_token_ids", None) or []
        for choice in chunk.choices:
            new_ids = getattr(choice, "token_ids", None) or []
            new_text = choice.delta.content or ""
            if new_ids:
                end = time.perf_counter()
            text += new_text
            token_ids += new_ids
            show(new_text, len(new_ids))
    if not token_ids:
        raise ValueError("the server's answer had no tokens")
    return Answer(text, prompt_ids, token_ids, [end - start])


def speculation_between(before: Metrics, after: Metrics) -> Speculation | None:
    """Speculation counters of what happened between two readings of ``/metrics``."""

    def count(name: str, **labels: str) -> int:
        return round(total(after, name, **labels) - total(before, name, **labels))

    positions = {
        int(dict(labels)["position"]) for name, labels in after if name == _PER_POSITION
    }
    if not positions:  # a server without speculation has no such counters
        return None
    per_position = tuple(
        count(_PER_POSITION, position=str(p)) for p in sorted(positions)
    )
    return Speculation(
        count(_DRAFTS), count(_DRAFT_TOKENS), count(_ACCEPTED), per_position
    )

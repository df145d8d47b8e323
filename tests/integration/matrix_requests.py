"""What is asked of servers in ``test_matrix_server``: a request for each feature.

Each is a function of an `Arm`, and what it returns can be compared between servers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration.test_server import TOOLS
from tests.tiny import EOS
from vllm_dspark.cli.server import Server

LIMIT = 256  # tokens of prompt and answer
QUESTION = "the rain in the east"


@dataclass(frozen=True)
class Arm:
    """One server and its client."""

    server: Server
    client: Any

    def complete(self, **settings: Any) -> Any:
        """A completion; what the openai client has no argument for goes beside."""
        own = {"ignore_eos": True, **settings.pop("own", {})}
        base = {"model": "tiny", "prompt": QUESTION, "max_tokens": 40, "temperature": 0}
        return self.client.completions.create(**{**base, **settings}, extra_body=own)

    def chat(self, **settings: Any) -> Any:
        own = {"ignore_eos": True, **settings.pop("own", {})}
        messages = [{"role": "user", "content": QUESTION}]
        base = {"model": "tiny", "messages": messages, "max_tokens": 40}
        return self.client.chat.completions.create(
            **{**base, "temperature": 0, **settings}, extra_body=own
        )

    def total(self, name: str) -> float:
        metrics = self.server.metrics().items()
        return sum(value for (found, _), value in metrics if found == name)


def only(answer: Any) -> tuple[str, str]:
    """Text and finish reason of the one completion."""
    (choice,) = answer.choices
    return choice.text, choice.finish_reason


def said(answer: Any) -> tuple[Any, ...]:
    (choice,) = answer.choices
    calls = choice.message.tool_calls or []
    named = [(call.function.name, call.function.arguments) for call in calls]
    return choice.message.content, named, choice.finish_reason


def streamed(arm: Arm) -> tuple[str, str, int]:
    """The same as `only`, put together from parts, and the usage's count."""
    chunks = list(arm.complete(stream=True, stream_options={"include_usage": True}))
    parts = [chunk.choices[0] for chunk in chunks[:-1]]
    text = "".join(part.text for part in parts)
    assert len(parts) > 5
    return text, parts[-1].finish_reason, chunks[-1].usage.completion_tokens


def streamed_chat(arm: Arm) -> tuple[str, str]:
    parts = [chunk.choices[0] for chunk in arm.chat(stream=True) if chunk.choices]
    text = "".join(part.delta.content or "" for part in parts)
    return text, parts[-1].finish_reason


def several(arm: Arm) -> list[str]:
    answer = arm.complete(n=3, temperature=0.9, own={"top_k": 1})
    return [choice.text for choice in answer.choices]


def with_logprobs(arm: Arm) -> tuple[list[str], list[float], list[str]]:
    found = arm.complete(logprobs=3).choices[0].logprobs
    # Sums in float32 depend on the shape of the batch.
    values = [round(value, 3) for value in found.token_logprobs]
    return found.tokens, values, [max(top, key=top.get) for top in found.top_logprobs]


def refused(ask: Callable[[], Any]) -> tuple[int, str]:
    """Status and message of a request that is not served."""
    from openai import APIStatusError

    with pytest.raises(APIStatusError) as error:
        ask()
    return error.value.status_code, error.value.message


def plain_text(arm: Arm) -> str:
    return only(arm.complete())[0]


SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["alpha", "beta", "gamma"]},
        "name": {"type": "string", "pattern": "^[a-z]{3,12}$"},
    },
    "required": ["kind", "name"],
    "additionalProperties": False,
}
REGEX = "[a-f]{4,20}-[0-9]{3}"
ENDS = {"ignore_eos": False}  # a grammar's end is the end token


def json_schema(arm: Arm) -> tuple[Any, ...]:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    return said(arm.chat(response_format=form, max_tokens=80, own=ENDS))


def regex(arm: Arm) -> tuple[str, str]:
    return only(arm.complete(own={"structured_outputs": {"regex": REGEX}, **ENDS}))


def tools_required(arm: Arm) -> tuple[Any, ...]:
    asked = {"tools": TOOLS[1:], "tool_choice": "required", "max_tokens": 190}
    return said(arm.chat(**asked, parallel_tool_calls=False, own=ENDS))


def min_tokens(arm: Arm) -> tuple[str, str]:
    """Two stop strings, the first of which comes too early."""
    text = plain_text(arm)
    return only(arm.complete(stop=[text[3], text[20]], own={"min_tokens": 12}))


def ends_at_once(arm: Arm) -> list[tuple[str, str, int]]:
    """Stopped by the first token, by its text, and by a limit of one token."""
    first = plain_text(arm)[0]
    answers = [
        arm.complete(own={"logit_bias": {str(EOS): 99.0}, "ignore_eos": False}),
        arm.complete(stop=[first]),
        arm.complete(max_tokens=1),
    ]
    return [(*only(answer), answer.usage.completion_tokens) for answer in answers]


def to_the_limit(arm: Arm) -> tuple[str, str, int]:
    """A prompt of most of the context, and an answer of the rest."""
    prompt = [3 + 7 * i % 120 for i in range(LIMIT - 70)]
    answer = arm.complete(prompt=prompt, max_tokens=70)
    return (*only(answer), answer.usage.total_tokens)


def too_long(arm: Arm) -> tuple[int, str]:
    return refused(lambda: arm.complete(prompt=[5] * (LIMIT + 1)))


def one_token(arm: Arm) -> list[str]:
    return [only(arm.complete(prompt=[token]))[0] for token in (5, 77)]


FEATURES: dict[str, Callable[[Arm], Any]] = {
    "completion": lambda arm: only(arm.complete()),
    "chat": lambda arm: said(arm.chat()),
    "streaming": streamed,
    "streaming_chat": streamed_chat,
    "several": several,
    "seed": lambda arm: only(arm.complete(temperature=1, seed=5, own={"top_k": 1})),
    "logprobs": with_logprobs,
    "penalties": lambda arm: only(
        arm.complete(presence_penalty=-1.5, own={"repetition_penalty": 0.8})
    ),
    "bad_words": lambda arm: only(
        arm.complete(own={"bad_words": re.findall(r"\w", plain_text(arm))[1:9:2]})
    ),
    "logit_bias": lambda arm: only(
        arm.complete(logit_bias={str(i): -6 for i in range(4, 128, 3)})
    ),
    "min_tokens": min_tokens,
    "stop": lambda arm: only(arm.complete(stop=[plain_text(arm)[9:12]])),
    "json_schema": json_schema,
    "regex": regex,
    "tools_auto": lambda arm: said(arm.chat(tools=TOOLS, tool_choice="auto")),
    "tools_required": tools_required,
    "priority": lambda arm: only(arm.complete(own={"priority": -3})),
    "lora": lambda arm: only(arm.complete(model="lora")),
    "one_token": one_token,
    "ends_at_once": ends_at_once,
    "to_the_limit": to_the_limit,
    "too_long": too_long,
    "goal": lambda arm: only(arm.complete(own={"vllm_xargs": {"slo_tps": 5}})),
}

"""What an operator may combine with DSpark, asked over HTTP with the openai client.

Two servers, float32, one without speculation and one with the adaptive policy; both
with adapters, priorities, tools, prefix caching and prompts in parts. The drafter's
context is shorter than the target's. What is asked greedily is answered alike, alone
and with everything in flight at once, and every feature has an effect: a feature that
is ignored by both would be equal as well.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.structured_requests import FREE, Kind, requests
from tests.integration.test_adaptive import cost_table, jagged
from tests.integration.test_server import ENVIRONMENT, TOOLS
from tests.tiny import EOS, make_tiny_drafter
from tests.tiny_lora import make_tiny_lora
from vllm_dspark.cli.server import Server

pytestmark = pytest.mark.slow

LIMIT = 256  # tokens of prompt and answer
QUESTION = "the rain in the east"
ARGUMENTS = [
    *["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"],
    *["--max-model-len", str(LIMIT), "--max-num-seqs", "16"],
    *["--max-num-batched-tokens", "128", "--scheduling-policy", "priority"],
    *["--kv-cache-memory-bytes", str(64 << 20)],
    *["--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
    *["--enable-lora", "--max-loras", "1", "--max-lora-rank", "8"],
    "--structured-outputs-config",
    # Otherwise a random model fills its answer with blanks and never ends.
    json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
]


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


@pytest.fixture(scope="module")
def arms(
    text_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Arm, Arm]]:
    """Without and with speculation; both start at the same time."""
    from openai import OpenAI

    folder, target = tmp_path_factory.mktemp("matrix"), text_pair[0]
    lora = make_tiny_lora(folder / "lora", target, lm_head=True)
    drafter = make_tiny_drafter(
        folder / "drafter", target, overrides={"max_position_embeddings": 192}
    )
    spec = json.dumps({"method": "dspark", "model": str(drafter)})
    ours = json.dumps({"dspark": {"cost_table": cost_table(folder, jagged)}})
    dspark = ["--speculative-config", spec, "--additional-config", ours]
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(
                Server(
                    target,
                    [*ARGUMENTS, "--lora-modules", f"lora={lora}", *extra],
                    folder / f"{name}.log",
                    ENVIRONMENT,
                )
            )
            for name, extra in (("plain", []), ("dspark", dspark))
        ]
        found = []
        for server in servers:
            server.wait_ready(lambda *_: None)
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            found.append(Arm(server, client))
        yield found[0], found[1]


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
        arm.complete(logit_bias={str(i): -6 for i in range(10, 128, 11)})
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
# Features that change the text of the plain question, which is the first feature.
CHANGING = ["penalties", "bad_words", "logit_bias", "min_tokens", "stop", "lora"]


@pytest.fixture(scope="module")
def answers(arms: tuple[Arm, Arm]) -> dict[str, Any]:
    """Of the arm without speculation, one after another."""
    return {name: ask(arms[0]) for name, ask in FEATURES.items()}


@pytest.mark.parametrize("name", FEATURES)
def test_feature(name: str, arms: tuple[Arm, Arm], answers: dict[str, Any]) -> None:
    assert FEATURES[name](arms[1]) == answers[name]


def test_every_feature_has_an_effect(answers: dict[str, Any]) -> None:
    text, reason = answers["completion"]
    assert len(text) >= 40 and reason == "length"
    assert answers["streaming"] == (text, reason, 40)
    assert answers["several"] == [text] * 3
    assert answers["seed"] == answers["priority"] == answers["goal"] == (text, reason)
    chat, calls, _ = answers["chat"]
    assert answers["streaming_chat"][0] == chat != text and calls == []
    assert "".join(answers["logprobs"][0]) == text
    changed = [answers[name][0] for name in CHANGING]
    assert len({text, *changed}) == len(CHANGING) + 1
    assert answers["stop"][1] == answers["min_tokens"][1] == "stop"
    assert len(answers["min_tokens"][0]) >= 12 > len(answers["stop"][0])
    assert set(json.loads(answers["json_schema"][0])) == {"kind", "name"}
    assert re.fullmatch(REGEX, answers["regex"][0])
    assert [name for name, _ in answers["tools_required"][1]] == ["clock"]
    by_token, by_text, by_limit = answers["ends_at_once"]
    assert by_token == ("", "stop", 1) and by_text == ("", "stop", 1)
    assert by_limit == (text[: len(by_limit[0])], "length", 1)
    assert answers["to_the_limit"][1:] == ("length", LIMIT)
    assert answers["too_long"][0] == 400 and str(LIMIT) in answers["too_long"][1]
    assert len(set(answers["one_token"])) == 2


def test_everything_at_once(arms: tuple[Arm, Arm], answers: dict[str, Any]) -> None:
    """Twice over, sixteen in flight: rows of a batch do not mix up."""
    names = list(FEATURES) * 2
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda name: FEATURES[name](arms[1]), names))
    wrong = [
        name
        for name, answer in zip(names, found, strict=True)
        if answer != answers[name]
    ]
    assert wrong == []


def test_a_goal_that_is_none_is_the_clients_mistake(arms: tuple[Arm, Arm]) -> None:
    dspark = arms[1]
    for goal in ("fast", -1):
        own = {"vllm_xargs": {"slo_tps": goal}}
        status, message = refused(lambda own=own: dspark.complete(own=own))
        assert status == 400 and "slo_tps" in message
    assert dspark.complete().choices[0].text


# ---- many forms at once ----


def test_structured_output(arms: tuple[Arm, Arm]) -> None:
    """200 schemas, 50 tool calls and free text, side by side.

    Greedy answers are those without speculation; sampled ones are valid whenever they
    end, and the random target ends every one in both arms.
    """
    plain, dspark = arms
    asked = requests()
    kinds = [request.kind for request in asked]
    assert kinds.count(Kind.SCHEMA) == 200 and kinds.count(Kind.TOOL) == 50
    with ThreadPoolExecutor(16) as pool:
        theirs = list(pool.map(lambda r: said(plain.chat(**r.settings)), asked))
        ours = list(pool.map(lambda r: said(dspark.chat(**r.settings)), asked))
    for request, without, answer in zip(asked, theirs, ours, strict=True):
        if request.greedy:
            assert answer == without
        assert request.is_valid(answer) == request.is_valid(without), request
    valid = [r.kind for r, a in zip(asked, ours, strict=True) if r.is_valid(a)]
    assert len(valid) == len(asked), "the target's limit is too low"
    assert kinds.count(Kind.FREE) == FREE


def test_what_the_engine_did(arms: tuple[Arm, Arm]) -> None:
    """After all of the above: drafts were made, trimmed, verified and accepted."""
    plain, dspark = arms
    counts = {
        name: dspark.total(f"vllm:dspark_{name}_tokens_total")
        for name in ("drafted", "trimmed", "verified", "accepted")
    }
    assert counts["drafted"] > counts["verified"] > counts["accepted"] > 500
    assert counts["trimmed"] > 50
    assert plain.total("vllm:spec_decode_num_draft_tokens_total") == 0


# ---- the end ----


@pytest.mark.parametrize("arm", ["plain", "dspark"])
def test_a_killed_worker_ends_the_server(
    arm: str, arms: tuple[Arm, Arm], answers: dict[str, Any]
) -> None:
    """Both alike: the client gets an error and no wrong text, the log a cause.

    The last test of this file: nothing is left to ask.
    """
    import httpx
    import psutil
    from openai import OpenAIError

    chosen = arms[("plain", "dspark").index(arm)]
    children = psutil.Process(chosen.server.pid).children(recursive=True)
    (worker,) = [p for p in children if "Worker" in " ".join(p.cmdline())]
    text = ""
    with pytest.raises((OpenAIError, httpx.HTTPError)):
        for number, chunk in enumerate(chosen.complete(max_tokens=200, stream=True)):
            if number == 3:
                worker.kill()
            text += chunk.choices[0].text
    whole = answers["completion"][0]
    assert len(text) > 3 and text[: len(whole)] == whole[: len(text)]
    with pytest.raises(ValueError, match="vllm serve ended") as ended:
        for _ in range(240):
            chosen.server.check_alive()
            time.sleep(0.25)
    assert "EngineDeadError" in str(ended.value) or "died" in str(ended.value)

"""Through `vllm serve`: tool calls with drafts in flight, and two API processes.

One server with DSpark and two API server processes, one without speculation, both in
float32: what they answer greedily must be equal. vLLM serves ``tool_choice``
``required`` and named through structured output: every verified row has the grammar's
mask. The model is random: forced answers
are valid all the same.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forks import ForkedServer
from vllm_dspark.cli.server import Server

pytestmark = pytest.mark.slow

ARGUMENTS = [
    *["--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"],
    *["--max-model-len", "512", "--max-num-seqs", "8", "--no-enable-prefix-caching"],
    *["--kv-cache-memory-bytes", str(64 << 20), "--enable-log-requests"],
    *["--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
    "--structured-outputs-config",
    # Otherwise a random model fills its answer with blanks and never ends.
    json.dumps({"backend": "xgrammar", "disable_any_whitespace": True}),
]
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    # Otherwise a call's form comes from a structural tag, in which blanks cannot be
    # forbidden, instead of a JSON schema.
    "VLLM_ENFORCE_STRICT_TOOL_CALLING": "0",
    # Set in this process by other tests; the servers' own log is read below.
    "VLLM_LOGGING_LEVEL": "INFO",
}
# No free text (xgrammar lets tabs into it, which vLLM's parser refuses) and no list
# without an end: a random model would not end it.
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Oslo", "Rome"]},
        "days": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        "note": {"type": "string", "pattern": "^[a-z]{3,12}$"},
    },
    "required": ["city", "days", "note"],
    "additionalProperties": False,
}
CLOCK = {
    "type": "object",
    "properties": {"zone": {"enum": ["east", "west"]}},
    "required": ["zone"],
    "additionalProperties": False,
}


def tool(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema}}


TOOLS = [tool("weather", WEATHER), tool("clock", CLOCK)]
CHOICES: dict[str, Any] = {
    "required": "required",
    "named": {"type": "function", "function": {"name": "weather"}},
}
QUESTIONS = ["the rain in the east", "tea at ten", "is it hot there", "ninety shirts"]


@pytest.fixture(scope="module")
def servers(
    text_pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Without and with speculation; both start at the same time."""
    logs = tmp_path_factory.mktemp("logs")
    target, drafter = text_pair
    spec = json.dumps({"method": "dspark", "model": str(drafter)})
    extra = {
        "plain": [],
        "dspark": ["--speculative-config", spec, "--api-server-count", "2"],
    }
    with contextlib.ExitStack() as stack:
        plain, dspark = (
            stack.enter_context(
                ForkedServer(
                    target, ARGUMENTS + more, logs / f"{name}.log", ENVIRONMENT
                )
            )
            for name, more in extra.items()
        )
        for server in (plain, dspark):
            server.wait_ready(lambda *_: None)
        yield plain, dspark


def client(server: Server) -> Any:
    """A client with connections of its own."""
    from openai import OpenAI

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def call(server: Server, question: str, **settings: Any) -> list[tuple[str, str]]:
    """(name, arguments) of the answer's tool calls."""
    answer = client(server).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": question}],
        tools=TOOLS,
        parallel_tool_calls=False,
        max_tokens=300,
        **{"temperature": 0.0, **settings},
    )
    calls = answer.choices[0].message.tool_calls
    assert calls, answer.choices[0]
    return [(c.function.name, c.function.arguments) for c in calls]


def drafted(server: Server) -> float:
    return sum(
        value
        for (name, _), value in server.metrics().items()
        if name == "vllm:spec_decode_num_draft_tokens_total"
    )


def assert_valid(calls: list[tuple[str, str]]) -> None:
    for name, text in calls:
        arguments = json.loads(text)
        schema = {"weather": WEATHER, "clock": CLOCK}[name]
        assert set(arguments) == set(schema["required"])


@pytest.mark.parametrize("choice", CHOICES)
def test_tool_calls(choice: str, servers: tuple[Server, Server]) -> None:
    plain, dspark = servers
    before = drafted(dspark)
    answers = []
    for question in QUESTIONS:
        expected = call(plain, question, tool_choice=CHOICES[choice])
        assert call(dspark, question, tool_choice=CHOICES[choice]) == expected
        assert_valid(expected)
        answers.append(str(expected))
    assert drafted(dspark) > before
    assert len(set(answers)) > 1, "every question gets the same answer"


@pytest.mark.parametrize("choice", CHOICES)
def test_sampled_tool_calls_side_by_side(
    choice: str, servers: tuple[Server, Server]
) -> None:
    def ask(seed: int) -> list[tuple[str, str]]:
        settings = {"temperature": 1.0, "seed": seed, "tool_choice": CHOICES[choice]}
        return call(servers[1], QUESTIONS[seed % 4], **settings)

    with ThreadPoolExecutor(8) as pool:
        for calls in pool.map(ask, range(16)):
            assert_valid(calls)


def test_every_api_process_takes_min_p_and_logit_bias(
    servers: tuple[Server, Server],
) -> None:
    """vLLM refuses both with speculation; each process validates for itself."""
    dspark = servers[1]
    settings: dict[str, Any] = {"logit_bias": {"20": -3}, "extra_body": {"min_p": 0.3}}
    seen: set[str] = set()
    # The kernel hands connections to the processes as it likes.
    for _ in range(50):
        client(dspark).completions.create(
            model="tiny", prompt="hello", max_tokens=4, **settings
        )
        log = dspark.log.read_text()
        seen = set(re.findall(r"\((ApiServer_\d) pid=\d+\).*Received request", log))
        if len(seen) == 2:
            break
    assert seen == {"ApiServer_0", "ApiServer_1"}

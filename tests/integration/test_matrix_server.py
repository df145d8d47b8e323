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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.forks import ForkedServer
from tests.integration.matrix_requests import FEATURES, LIMIT, REGEX, Arm, refused, said
from tests.integration.structured_requests import FREE, Kind, requests
from tests.integration.test_adaptive import cost_table, jagged
from tests.integration.test_server import ENVIRONMENT
from tests.tiny import make_tiny_drafter
from tests.tiny_lora import make_tiny_lora
from vllm_dspark.cli.server import Server

pytestmark = pytest.mark.slow

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
# Features that change the text of the plain question, which is the first feature.
CHANGING = ["penalties", "bad_words", "logit_bias", "min_tokens", "stop", "lora"]


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
                kind(
                    target,
                    [*ARGUMENTS, "--lora-modules", f"lora={lora}", *extra],
                    folder / f"{name}.log",
                    ENVIRONMENT,
                )
            )
            for name, kind, extra in (
                ("plain", ForkedServer, []),
                ("dspark", Server, dspark),
            )
        ]
        found = []
        for server in servers:
            server.wait_ready(lambda *_: None)
            client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
            found.append(Arm(server, client))
        yield found[0], found[1]


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
    """Twice over, sixteen in flight: rows of a batch do not mix up.

    But for adapters: beside one, vLLM's CPU kernels (0.32) give it to rows that asked
    for none as well, without speculation too.
    """
    names = [name for name in FEATURES if name != "lora"] * 2
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
    parents = {chosen.server.pid, *(p.ppid() for p in children)}
    (worker,) = [  # the engine's child
        p
        for p in children
        if p.pid not in parents
        and p.ppid() != chosen.server.pid
        and "resource_tracker" not in " ".join(p.cmdline())
    ]
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
    assert "last lines of" in str(ended.value)
    log = chosen.server.log.read_text()
    assert "died unexpectedly" in log and "EngineCore encountered a fatal error" in log

"""Rounds from real serving: `vllm serve` with a trace file, prompts over HTTP.

vLLM's engine knows a request by ``cmpl-<X-Request-Id>-<choice>-<random>``: our header
carries temperature and prompt as two numbers, which the trace then has.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dspark.cache import cache_root
from vllm_dspark.calibration.rounds import PromptRounds
from vllm_dspark.cli import display
from vllm_dspark.cli.rounds.prompts import Prompt
from vllm_dspark.cli.rounds.settings import Decoding, Drafting
from vllm_dspark.cli.server import Server, speculative_arguments
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT
from vllm_dspark.types import StepRecord

_REQUEST = re.compile(r"dspark-(\d+)-(\d+)-\d+-[0-9a-f]+$")
_PATIENCE = 30.0  # seconds for the last rounds to reach the trace file
_ANSWER_TIMEOUT = 1800.0

Key = tuple[int, int]  # index of the temperature, number of the prompt


@contextmanager
def serving(
    decoding: Decoding,
    drafting: Drafting,
    prompts: Sequence[Prompt],
    console: Console,
    trace: Path | None,
) -> Iterator[Server]:
    """A ready server that drafts as asked, and writes ``trace`` if given."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    width = drafting.num_speculative_tokens
    room = longest + decoding.max_tokens + width + 1
    extra = ["--max-model-len", str(room), "--max-num-seqs", str(decoding.concurrency)]
    if trace is not None:
        # All drafts of all rounds: what is judged is the drafter.
        options = {"dspark": {"trace": str(trace), "policy": "fixed"}}
        extra += ["--additional-config", json.dumps(options)]
    environment = dict(SERVER_ENVIRONMENT)
    if not os.path.isdir(decoding.target):
        environment.pop("HF_HUB_OFFLINE", None)
    server = Server(
        decoding.target,
        [
            *["--served-model-name", "target", "--dtype", decoding.dtype],
            # A short run: compiling would take longer than it saves.
            *["--enforce-eager", "--no-enable-prefix-caching", *extra],
            *speculative_arguments(drafting.speculative_config()),
        ],
        log=cache_root() / "logs" / f"rounds-{os.getpid()}.log",
        environment=environment,
    )
    with server:
        display.wait_for(console, server, f"starting vllm serve ({drafting.method})")
        yield server


@contextmanager
def running(
    decoding: Decoding,
    drafting: Drafting,
    prompts: Sequence[Prompt],
    console: Console,
) -> Iterator[Callable[[Callable[[], None]], dict[float, list[PromptRounds]]]]:
    """A server with a trace file; gives the function that collects the rounds.

    That function decodes every prompt at every temperature, several at a time, and
    calls its argument after each text.

    Raises:
        ValueError: the server did not start or died, or the trace lacks rounds.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-dspark-") as folder:
        trace = Path(folder) / "rounds.jsonl"
        with serving(decoding, drafting, prompts, console, trace) as server:

            def collect(
                advance: Callable[[], None],
            ) -> dict[float, list[PromptRounds]]:
                answers: dict[Key, list[int]] = {}
                for index in range(len(decoding.temperatures)):
                    answers |= ask_all(server, decoding, index, prompts, advance)
                rounds = _complete(trace, answers)
                return {
                    temperature: [
                        _of_prompt(prompt, answers, rounds, index) for prompt in prompts
                    ]
                    for index, temperature in enumerate(decoding.temperatures)
                }

            yield collect


def _of_prompt(
    prompt: Prompt,
    answers: dict[Key, list[int]],
    rounds: dict[Key, list[StepRecord]],
    index: int,
) -> PromptRounds:
    key = (index, prompt.number)
    return PromptRounds(
        prompt.number,
        prompt.dataset,
        len(prompt.token_ids),
        tuple(answers[key]),
        tuple(rounds.get(key, ())),
    )


def ask_all(
    server: Server,
    decoding: Decoding,
    index: int,
    prompts: Sequence[Prompt],
    advance: Callable[[], None],
) -> dict[Key, list[int]]:
    """Token ids of the answers at the ``index``-th temperature."""

    def ask(prompt: Prompt) -> list[int]:
        body = {
            "model": "target",
            "prompt": list(prompt.token_ids),
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperatures[index],
            "seed": prompt.number,
            "return_token_ids": True,
            # Not what the target's generation_config.json may say.
            **{"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        }
        ids = _post(server, body, f"dspark-{index}-{prompt.number}")
        advance()
        return ids

    pool = ThreadPoolExecutor(decoding.concurrency)
    try:
        texts = list(pool.map(ask, prompts))
    finally:
        # After an error or Ctrl-C nobody waits for the answers under way: the server
        # is stopped next, which ends them.
        pool.shutdown(wait=False, cancel_futures=True)
    return {(index, p.number): ids for p, ids in zip(prompts, texts, strict=True)}


def _post(server: Server, body: dict[str, Any], request_id: str) -> list[int]:
    request = urllib.request.Request(
        f"{server.url}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json", "X-Request-Id": request_id},
    )
    try:
        with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT) as answer:
            ids = json.load(answer)["choices"][0]["token_ids"]
    except urllib.error.HTTPError as error:
        detail = error.read().decode(errors="replace")[:500]
        raise ValueError(f"vllm serve refused a prompt: {detail}") from None
    except OSError as error:
        server.check_alive()
        raise ValueError(f"vllm serve did not answer ({error})") from error
    return [int(token) for token in ids]


def _complete(
    trace: Path, answers: dict[Key, list[int]]
) -> dict[Key, list[StepRecord]]:
    """The traced rounds, once they account for every token of the answers."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        rounds = read_trace(trace) if trace.is_file() else {}
        lacking = [
            key
            for key, ids in answers.items()
            # The prefill gives one token, and each round its drafts and one more.
            if 1 + sum(s.num_accepted + 1 for s in rounds.get(key, ())) < len(ids)
        ]
        if not lacking:
            return rounds
        if time.monotonic() > deadline:
            raise ValueError(
                f"the trace lacks rounds of {len(lacking)} of {len(answers)} answers. "
                "It is written by this plugin's V1 runner: is the plugin installed "
                "(`vllm-dspark check`)? On a GPU set VLLM_USE_V2_MODEL_RUNNER=0, or "
                "use --engine torch"
            )
        time.sleep(0.2)


def read_trace(file: Path) -> dict[Key, list[StepRecord]]:
    """Rounds of our requests by (temperature, prompt) number, in order."""
    found: dict[Key, list[StepRecord]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        name = _REQUEST.search(row["request"])
        if name is None:
            continue
        step = StepRecord(
            row["position"],
            row["anchor"],
            tuple(row["drafts"]),
            row["accepted"],
            tuple(row["confidences"]),
            tuple(row["certainties"]),
        )
        found.setdefault((int(name[1]), int(name[2])), []).append(step)
    return found

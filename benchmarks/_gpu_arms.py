"""Servers on the GPU, one after another, asked the same questions."""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import _bench_common as common
from _full_head import with_lm_head

from vllm_dspark.cli.arms import ask, connect, geometric_mean, speculation_between
from vllm_dspark.cli.server import Server, speculative_arguments

PROMPTS = Path(__file__).resolve().parent / "data" / "gpu-check-prompts.jsonl"
WITHOUT_PLUGIN = {"VLLM_PLUGINS": ""}
LOG_LINES = 60


def arms_of(
    drafter: str, positions: int | None, attention: str | None = None
) -> dict[str, dict[str, Any]]:
    """Speculative config, our options and environment of each arm."""
    spec: dict[str, Any] = {"method": "dspark", "model": drafter}
    if attention is not None:
        spec["attention_backend"] = attention
    if positions is not None:
        spec["num_speculative_tokens"] = positions
    adaptive = {**spec, "enable_adaptive_verification": True}
    ours = {"policy": "adaptive"}
    return {
        "none": {},
        "vllm fixed": {"spec": spec, "environment": WITHOUT_PLUGIN},
        "vllm adaptive": {"spec": adaptive, "environment": WITHOUT_PLUGIN},
        "dspark fixed": {"spec": spec, "ours": {"policy": "fixed"}},
        "dspark adaptive": {"spec": adaptive, "ours": ours},
        "dspark adaptive, kernel": {
            "spec": adaptive,
            "ours": {**ours, "rejection_kernel": "dspark"},
        },
    }


def arguments_of(arm: dict[str, Any], streams: int) -> list[str]:
    """Of ``vllm serve``."""
    found = ["--max-model-len", "2048", "--max-num-seqs", str(max(streams, 8))]
    found += ["--no-enable-prefix-caching", *speculative_arguments(arm.get("spec"))]
    if "ours" in arm:
        found += ["--additional-config", json.dumps({"dspark": arm["ours"]})]
    return found


def questions() -> list[list[dict[str, str]]]:
    return [row["messages"] for row in common.read_rows(PROMPTS)]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed, τ and equal texts of each arm."""
    target, drafter = arguments.target, arguments.drafter
    if target is None:
        from vllm_dspark.cli import target as demo_target
        from vllm_dspark.cli.demo import find_drafter

        target, drafter = str(demo_target.prepare(print)), str(find_drafter(None))
    attention = arguments.drafter_attention
    every = arms_of(drafter, arguments.num_speculative_tokens, attention)
    chosen = {name: every[name] for name in arguments.arms}
    for arm in chosen.values():
        if "environment" in arm:  # vLLM alone
            out = Path(arguments.logs) / "drafter"
            whole = with_lm_head(Path(drafter), Path(target), out)
            arm["spec"] = {**arm["spec"], "model": str(whole)}
    found: dict[str, Any] = {}
    texts: dict[str, list[list[int]]] = {}
    if arguments.at_once:
        _all_at_once(chosen, target, arguments, found, texts)
    else:
        for name, arm in chosen.items():
            with (
                _reported(name, arguments, found),
                _started(name, arm, target, arguments) as server,
            ):
                ready = server.wait_ready(lambda *_: None)
                warm_up(server)
                result, texts[name] = one_round(server, arguments)
                found[name] = {"ready_seconds": ready, **result}
    for name, answers in texts.items():
        if "none" in texts:
            pairs = zip(answers, texts["none"], strict=True)
            found[name]["texts_equal"] = sum(a == b for a, b in pairs)
        print(name, found[name], flush=True)
    return found


def _all_at_once(
    chosen: dict[str, dict[str, Any]],
    target: str,
    arguments: argparse.Namespace,
    found: dict[str, Any],
    texts: dict[str, list[list[int]]],
) -> None:
    """All servers live, asked in turns: what disturbs the machine disturbs all arms.

    Those that measure their costs at start do so while the others are idle.
    """
    rounds: dict[str, list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        servers: dict[str, Server] = {}
        for measuring in (False, True):
            some = {n: a for n, a in chosen.items() if _measures(a) is measuring}
            for name, arm in some.items():
                with _reported(name, arguments, found):
                    started = _started(name, arm, target, arguments)
                    servers[name] = stack.enter_context(started)
                if measuring and name in servers:
                    _wait(name, arguments, found, servers)
            for name in some:
                if name in servers and not measuring:
                    _wait(name, arguments, found, servers)
        for server in servers.values():
            warm_up(server)
        for _ in range(arguments.rounds):
            for name, server in list(servers.items()):
                with _reported(name, arguments, found):
                    result, texts[name] = one_round(server, arguments)
                    rounds.setdefault(name, []).append(result)
    for name, results in rounds.items():
        found[name].update(_medians(results))


def _measures(arm: dict[str, Any]) -> bool:
    return "enable_adaptive_verification" in arm.get("spec", {})


def _wait(
    name: str,
    arguments: argparse.Namespace,
    found: dict[str, Any],
    servers: dict[str, Server],
) -> None:
    """Note how long a server took to be ready, or leave it out."""
    server = servers.pop(name)
    with _reported(name, arguments, found):
        found[name] = {"ready_seconds": server.wait_ready(lambda *_: None)}
        servers[name] = server


def _medians(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure over the rounds, and the rounds themselves."""
    whole = {k: statistics.median(r[k] for r in results) for k in results[0]}
    return {**whole, "rounds": results}


@contextmanager
def _reported(
    name: str, arguments: argparse.Namespace, found: dict[str, Any]
) -> Iterator[None]:
    """An arm that fails is an entry of the report."""
    try:
        yield
    except Exception as error:
        found[name] = {"error": f"{type(error).__name__}: {error}"}
        found[name]["log"] = log_end(log_of(name, arguments))
        print(name, found[name]["error"], flush=True)


@contextmanager
def _started(
    name: str, arm: dict[str, Any], target: str, arguments: argparse.Namespace
) -> Iterator[Server]:
    options = arguments_of(arm, max(arguments.streams)) + arguments.serve_args
    server = Server(target, options, log_of(name, arguments), arm.get("environment"))
    with server, stopped_after(server, arguments.arm_seconds):
        yield server


def log_of(name: str, arguments: argparse.Namespace) -> Path:
    """Where an arm's server writes."""
    file = name.replace(" ", "-").replace(",", "") + ".log"
    return Path(arguments.logs) / file


def log_end(log: Path) -> list[str]:
    """The last lines of a log, none if there is none."""
    if not log.exists():
        return []
    return log.read_text(errors="replace").splitlines()[-LOG_LINES:]


@contextmanager
def stopped_after(server: Server, seconds: float) -> Iterator[None]:
    """Stops the server when time is up; what then fails names the limit."""
    over = threading.Event()

    def stop() -> None:
        over.set()
        server.stop()

    timer = threading.Timer(seconds, stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception as error:
        if over.is_set():
            raise TimeoutError(f"the arm took over {seconds:g} s") from error
        raise
    finally:
        timer.cancel()


def warm_up(server: Server) -> None:
    """Graphs and caches; not counted."""
    client = connect(server)
    for messages in questions()[:3]:
        ask(client, messages, 16, lambda *_: None)


def one_round(
    server: Server, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[list[int]]]:
    """Figures of all questions, one stream and several, and the answers."""
    asked, limit = questions(), arguments.max_tokens
    client, before = connect(server), server.metrics()
    result: dict[str, Any] = {"prompts": len(asked)}
    alone = [ask(client, messages, limit, lambda *_: None) for messages in asked]
    result["one_stream_tok_s"] = geometric_mean(
        [answer.tokens_per_second for answer in alone]
    )
    for streams in arguments.streams:
        if streams > 1:
            result[f"throughput_{streams}_tok_s"] = _together(
                client, asked, limit, streams
            )
    counted = speculation_between(before, server.metrics())
    if counted is not None:
        result["tau"] = counted.accepted_length
        result["drafts_verified_per_round"] = counted.draft_tokens / max(
            counted.rounds, 1
        )
    return result, [answer.token_ids for answer in alone]


def _together(client: Any, asked: list[Any], limit: int, streams: int) -> float:
    """Tokens per second of so many requests at a time, each question twice."""
    start = time.perf_counter()
    with ThreadPoolExecutor(streams) as pool:
        answers = list(
            pool.map(lambda m: ask(client, m, limit, lambda *_: None), asked * 2)
        )
    tokens = sum(len(answer.token_ids) for answer in answers)
    return tokens / (time.perf_counter() - start)

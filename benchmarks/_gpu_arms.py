"""Servers on the GPU, one after another, asked the same questions."""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm_dspark.cli.arms import ask, connect, geometric_mean, speculation_between
from vllm_dspark.cli.server import Server, speculative_arguments

PROMPTS = Path(__file__).resolve().parent / "data" / "gpu-check-prompts.jsonl"
WITHOUT_PLUGIN = {"VLLM_PLUGINS": ""}
LOG_LINES = 60


def arms_of(drafter: str, positions: int | None) -> dict[str, dict[str, Any]]:
    """Speculative config, our options and environment of each arm."""
    spec: dict[str, Any] = {"method": "dspark", "model": drafter}
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
    rows = map(json.loads, PROMPTS.read_text().splitlines())
    return [row["messages"] for row in rows]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Speed, τ and equal texts of each arm."""
    target, drafter = arguments.target, arguments.drafter
    if target is None:
        from vllm_dspark.cli import target as demo_target
        from vllm_dspark.cli.demo import find_drafter

        target, drafter = str(demo_target.prepare(print)), str(find_drafter(None))
    found: dict[str, Any] = {}
    texts: dict[str, list[list[int]]] = {}
    every = arms_of(drafter, arguments.num_speculative_tokens)
    for name in arguments.arms:
        try:
            found[name], texts[name] = _run(name, every[name], target, arguments)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            found[name]["log"] = log_end(log_of(name, arguments))
            print(name, found[name]["error"], flush=True)
            continue
        if "none" in texts:
            pairs = zip(texts[name], texts["none"], strict=True)
            found[name]["texts_equal"] = sum(a == b for a, b in pairs)
        print(name, found[name], flush=True)
    return found


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


def _run(
    name: str, arm: dict[str, Any], target: str, arguments: argparse.Namespace
) -> tuple[dict[str, Any], list[list[int]]]:
    options = arguments_of(arm, max(arguments.streams)) + arguments.serve_args
    asked, limit = questions(), arguments.max_tokens
    server = Server(target, options, log_of(name, arguments), arm.get("environment"))
    with server, stopped_after(server, arguments.arm_seconds):
        ready = server.wait_ready(lambda *_: None)
        client = connect(server)
        for messages in asked[:3]:  # graphs and caches; not counted
            ask(client, messages, 16, lambda *_: None)
        before = server.metrics()
        result: dict[str, Any] = {"ready_seconds": ready, "prompts": len(asked)}
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

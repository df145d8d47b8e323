"""The arms of the load sweep, and their servers.

An arm is a name and what `vllm serve` is told beyond what all arms share. Knows
nothing of load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _bench_common  # noqa: F401  (makes the package importable)
import psutil
from bench_e2e import NGRAM

from vllm_dspark.cli.server import Server, speculative_arguments
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT

# What each named arm says to the plugin besides its drafter: tokens, options.
DSPARK: dict[str, tuple[int | None, dict[str, Any]]] = {
    "dspark-fixed-1": (1, {"policy": "fixed"}),
    "dspark-fixed-3": (3, {"policy": "fixed"}),
    "dspark-fixed-7": (7, {"policy": "fixed"}),
    "dspark-threshold": (None, {"policy": "threshold"}),
    "dspark-no-bypass": (None, {"policy": "adaptive", "bypass": False}),
    # No number of drafts set by hand: the drafter's block is the limit.
    "dspark-adaptive": (None, {"policy": "adaptive"}),
}
NAMES = ("none", "ngram", *DSPARK)
KEYS = ("speculative_config", "additional_config")


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to serve the target."""

    name: str
    speculative_config: dict[str, Any] | None = None
    additional_config: dict[str, Any] | None = None

    @property
    def arguments(self) -> list[str]:
        """Arguments of `vllm serve` that belong to this arm alone."""
        found = speculative_arguments(self.speculative_config)
        if self.additional_config:
            found += ["--additional-config", json.dumps(self.additional_config)]
        return found

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def named(name: str, drafter: str) -> Arm:
    """An arm of `NAMES`.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "none":
        return Arm(name)
    if name == "ngram":
        return Arm(name, dict(NGRAM))
    if name not in DSPARK:
        raise ValueError(
            f"no arm is called {name!r} (known: {', '.join(NAMES)}); define one with "
            "--arm NAME='{\"speculative_config\": {...}}'"
        )
    tokens, options = DSPARK[name]
    spec: dict[str, Any] = {"method": "dspark", "model": drafter}
    if tokens is not None:
        spec["num_speculative_tokens"] = tokens
    return Arm(name, spec, {"dspark": options})


def custom(text: str) -> Arm:
    """An arm typed as NAME=JSON; the JSON's keys are `KEYS`, either may be absent.

    Raises:
        ValueError: it is not of that form.
    """
    name, equals, raw = text.partition("=")
    form = f"--arm is {text!r}; it must be NAME='{{\"speculative_config\": {{...}}}}'"
    if not equals or not name or "/" in name:
        raise ValueError(form)
    try:
        config = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"{form}, but its JSON is damaged ({error})") from None
    values = config.values() if isinstance(config, dict) else [None]
    if not all(isinstance(value, dict) for value in values):
        raise ValueError(f"{form}, and its values objects")
    if unknown := set(config) - set(KEYS):
        raise ValueError(
            f"--arm {name}: unknown key {sorted(unknown)[0]!r} "
            f"(known: {', '.join(KEYS)})"
        )
    return Arm(name, **config)


def shared_arguments(args: argparse.Namespace) -> list[str]:
    """Arguments of `vllm serve` that every arm gets."""
    sequences = args.max_num_seqs or max([*args.concurrency, *args.split_datasets])
    found = ["--max-model-len", str(args.max_model_len)]
    found += ["--max-num-seqs", str(sequences)]
    # Prompts come again in later rounds; they must not skip their prefill then.
    found += ["--no-enable-prefix-caching"]
    return found + ([] if args.compiled else ["--enforce-eager"])


class Fleet(contextlib.ExitStack):
    """Running servers by arm; a context manager that stops them all.

    Args:
        target: model folder.
        shared: arguments for every server.
        kv_gib: K/V cache of each, GiB.
        logs: folder for their logs.
    """

    def __init__(
        self, target: str, shared: Sequence[str], kv_gib: int, logs: Path
    ) -> None:
        super().__init__()
        self.target, self.shared, self.logs = target, list(shared), logs
        self.environment = {**SERVER_ENVIRONMENT, "VLLM_CPU_KVCACHE_SPACE": str(kv_gib)}
        self.servers: dict[str, Server] = {}

    def start(self, arm: Arm, progress: Callable[[float, str], None]) -> float:
        """Start one server and wait until it is ready; returns seconds.

        One after the other: an adaptive arm may measure what steps cost while it
        starts, and needs the machine for itself.

        Raises:
            ValueError: it did not start, with its log's last lines.
        """
        server = self.server(arm)
        with contextlib.ExitStack() as until_ready:
            until_ready.enter_context(server)
            seconds = server.wait_ready(progress)
            self.enter_context(until_ready.pop_all())
        self.servers[arm.name] = server
        return seconds

    def server(self, arm: Arm) -> Server:
        """The server of an arm, not started."""
        arguments = [*self.shared, *arm.arguments]
        log = self.logs / f"{arm.name}.log"
        return Server(self.target, arguments, log, self.environment)

    def stop(self) -> None:
        """Stop all servers; others may be started afterwards."""
        self.close()
        self.servers.clear()


def check_memory(each: float, available: float, more: int) -> None:
    """Whether further servers fit.

    Args:
        each: GiB of one.
        available: GiB that are left.
        more: how many more shall start.

    Raises:
        ValueError: they do not fit.
    """
    if more * each > available:
        raise ValueError(
            f"{more} more servers of about {each:.1f} GiB each do not fit into the "
            f"{available:.1f} GiB that are left: name fewer --arms, or use "
            "--one-at-a-time or a smaller --kv-gib"
        )


def available_gib() -> float:
    """Memory that can be used without swapping, GiB."""
    return float(psutil.virtual_memory().available) / 2**30


def own_gib(server: Server) -> float:
    """Memory that a server and its children share with nobody, GiB."""
    sizes = [process.memory_full_info().uss for process in _family(server)]
    return float(sum(sizes)) / 2**30


def idle_load(servers: Mapping[str, Server], seconds: float = 5.0) -> dict[str, float]:
    """Cores that each idle server keeps busy; an honest sweep needs about none."""

    def used(server: Server) -> float:
        return float(sum(sum(p.cpu_times()[:2]) for p in _family(server)))

    time.sleep(1)  # OpenMP threads spin for a moment after their last work
    before = {name: used(server) for name, server in servers.items()}
    time.sleep(seconds)
    return {name: (used(s) - before[name]) / seconds for name, s in servers.items()}


def _family(server: Server) -> list[psutil.Process]:
    root = psutil.Process(server.pid)
    return [root, *root.children(recursive=True)]

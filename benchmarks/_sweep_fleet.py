"""The servers of the load sweep's arms: starting, stopping, memory, idleness."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import _bench_common  # noqa: F401  (makes the package importable)
import psutil
from _sweep_arms import Arm

from vllm_dspark.cli.server import Metrics, Server, read_metrics
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT

_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"


def shared_arguments(args: argparse.Namespace) -> list[str]:
    """Arguments of `vllm serve` that every arm gets."""
    found = ["--max-model-len", str(args.max_model_len)]
    found += ["--max-num-seqs", str(args.max_num_seqs)]
    # Prompts come again in later rounds; they must not skip their prefill then.
    found += ["--no-enable-prefix-caching"]
    found += ["--dtype", args.dtype]
    return found + ([] if args.compiled else ["--enforce-eager"])


class Endpoint(Protocol):
    """A server that is ready, ours or another's."""

    @property
    def url(self) -> str: ...
    @property
    def model(self) -> str: ...
    def metrics(self) -> Metrics: ...
    def check_alive(self) -> None: ...


class OwnServer(Server):
    """A server that the sweep starts; ``model`` is its name in requests."""

    def __init__(self, model: str, *rest: Any, **named: Any) -> None:
        super().__init__(model, *rest, **named)
        self.model = model


class Remote:
    """A server that runs already; it is left running.

    Args:
        url: without `/v1`.

    Raises:
        ValueError: nothing answers there as OpenAI's servers do.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        try:
            self.model = str(self._models()["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"{self.url}/v1/models does not name a model "
                f"({type(error).__name__}: {error})"
            ) from None

    def _models(self) -> Any:
        with urllib.request.urlopen(f"{self.url}/v1/models", timeout=10) as answer:
            return json.load(answer)

    def check_alive(self) -> None:
        """Raise a ValueError if it answers no more."""
        try:
            self._models()
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.url} answers no more ({error})") from None

    def metrics(self) -> Metrics:
        """As `Server.metrics`; nothing where it has none (it may not be vLLM)."""
        try:
            return read_metrics(self.url)
        except urllib.error.HTTPError:
            return {}


class Fleet(contextlib.ExitStack):
    """Running servers by arm; a context manager that stops them all.

    Args:
        target: model folder.
        shared: arguments for every server.
        kv_gib: K/V cache of each, GiB.
        logs: folder for their logs.
    """

    def __init__(
        self, target: str, shared: Sequence[str], kv_gib: float, logs: Path
    ) -> None:
        super().__init__()
        self.target, self.logs = target, logs
        bytes_ = round(kv_gib * 2**30)
        self.shared = [*shared, "--kv-cache-memory-bytes", str(bytes_)]
        self.environment = {**SERVER_ENVIRONMENT}
        self.environment.pop(_KV_SPACE, None)  # knows whole GiB only
        self.servers: dict[str, Endpoint] = {}

    def start(self, arm: Arm, progress: Callable[[float, str], None]) -> float:
        """Start one server and wait until it is ready; returns seconds.

        One after the other: an adaptive arm may measure what steps cost while it
        starts, and needs the machine for itself.

        Raises:
            ValueError: it did not start, with its log's last lines.
        """
        if arm.url:
            self.servers[arm.name] = Remote(arm.url)
            return 0.0
        server = self.server(arm)
        with contextlib.ExitStack() as until_ready:
            until_ready.enter_context(server)
            seconds = server.wait_ready(progress)
            self.enter_context(until_ready.pop_all())
        self.servers[arm.name] = server
        return seconds

    def server(self, arm: Arm) -> OwnServer:
        """The server of an arm, not started.

        Raises:
            ValueError: the environment says another size of the K/V cache.
        """
        if _KV_SPACE in os.environ:
            raise ValueError(
                f"{_KV_SPACE} is {os.environ[_KV_SPACE]!r} and would overrule --kv-gib"
                ": unset it"
            )
        arguments = [*self.shared, *arm.arguments]
        log = self.logs / f"{arm.name}.log"
        return OwnServer(self.target, arguments, log, self.environment)

    @contextlib.contextmanager
    def alone(self, name: str) -> Iterator[Endpoint]:
        """Halt the processes of all servers but one, and let them go on afterwards."""
        others = [server for arm, server in self.own().items() if arm != name]
        try:
            for server in others:
                _signal(server, signal.SIGSTOP)
            yield self.servers[name]
        finally:
            for server in others:
                _signal(server, signal.SIGCONT)

    def own(self) -> dict[str, OwnServer]:
        """The servers that were started here."""
        return {n: s for n, s in self.servers.items() if isinstance(s, OwnServer)}

    def stop(self) -> None:
        """Stop all servers; others may be started afterwards."""
        self.close()
        self.servers.clear()


def kv_gib(folders: Sequence[str], tokens: int, number_bytes: int = 2) -> float:
    """K/V cache that holds a number of tokens, GiB, with a quarter to spare.

    Args:
        folders: of the models that keep K/V of each token: target and drafter.
        tokens: of all requests together.
        number_bytes: of a number.

    Raises:
        ValueError: a model's config.json does not say how large its K/V is.
    """
    each = number_bytes * sum(map(_token_numbers, folders))
    return round(1.25 * tokens * each / 2**30, 2)


def _token_numbers(folder: str) -> int:
    """Numbers of a token's K/V in all layers."""
    file = Path(folder) / "config.json"
    try:
        config = json.loads(file.read_text())
        for part in ("text_config", "transformer_layer_config"):
            config = config.get(part, config)
        heads = config["num_attention_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        layers = config["num_hidden_layers"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} does not say how large the K/V cache must be "
            f"({type(error).__name__}: {error}); give --kv-gib"
        ) from None
    return int(2 * layers * kv_heads * size)


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
    sizes = [process.memory_full_info().uss for process in family(server.pid)]
    return float(sum(sizes)) / 2**30


def idle_load(servers: Mapping[str, Server], seconds: float = 5.0) -> dict[str, float]:
    """Cores that each idle server keeps busy; an honest sweep needs about none."""

    def used(server: Server) -> float:
        return float(sum(sum(p.cpu_times()[:2]) for p in family(server.pid)))

    time.sleep(1)  # OpenMP threads spin for a moment after their last work
    before = {name: used(server) for name, server in servers.items()}
    time.sleep(seconds)
    return {name: (used(s) - before[name]) / seconds for name, s in servers.items()}


def _signal(server: Server, which: signal.Signals) -> None:
    """Send a signal to a server and its children; one that is gone needs none."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, which)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that come from it."""
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]

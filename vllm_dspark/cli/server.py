"""`vllm serve` as a subprocess: start, wait with visible progress, read, stop.

A server writes to a log file. When it dies, the error that reaches the user carries
the log's first cause and its last lines. Knows nothing of DSpark.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HOST = "127.0.0.1"
# Cold start is about 110 s on two cores; a loaded machine may take several times that.
START_TIMEOUT = 600.0
# The last step's statistics arrive at /metrics a moment after its last token.
SETTLE = 0.3
# What vLLM puts before a message: process name, level, date and source line.
_PREFIX = re.compile(r"^(\([^)]*\) )*([A-Z]+ [\d-]+ [\d:.]+ )?(\[[^\]]*\] )?")
_ERROR = re.compile(r"\b[A-Za-z_.]*(Error|Exception)\b: \S")
# A warning may speak of errors that could come.
_HARMLESS = re.compile(r"^(\([^)]*\) )*(DEBUG|INFO|WARNING) ")
# Says only that another process failed.
_SECOND_HAND = re.compile(
    r"EngineDeadError|Engine core initialization failed|WorkerProc"
)

# Becomes the command after asking Linux for SIGTERM when its parent dies: a parent that
# is killed stops nothing itself, and an orphan would hold memory for ever.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)  # it died before we asked
os.execv(sys.argv[2], sys.argv[2:])
"""

Metrics = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def free_port(wanted: int | None = None) -> int:
    """Return ``wanted`` if it is free (else an error), or any free port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, wanted or 0))
        except OSError as error:
            raise ValueError(f"port {wanted}: {error.strerror}; try another") from None
        port: int = probe.getsockname()[1]
        return port


class Server:
    """One `vllm serve` process; a context manager that always stops it.

    Args:
        model: model folder or name, also the name clients use unless served otherwise.
        arguments: further command-line arguments of `vllm serve`.
        log: file for its output (overwritten).
        environment: variables added to this process's own.
        port: port to listen on.
    """

    def __init__(
        self,
        model: str | Path,
        arguments: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
    ) -> None:
        self.port = free_port(port)
        self.url = f"http://{HOST}:{self.port}"
        self.log = log
        self.command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
        self.command += [str(model), "--host", HOST, "--port", str(self.port)]
        self.command += arguments
        self._environment = {**os.environ, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        starter = [sys.executable, "-c", _END_WITH_PARENT, str(os.getpid())]
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                starter + self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                # Its own group: Ctrl-C reaches us only, and stop() reaches all of it.
                start_new_session=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_ready(
        self,
        progress: Callable[[float, str], None],
        timeout: float = START_TIMEOUT,
    ) -> float:
        """Wait for ``/health``; returns the seconds it took.

        Args:
            progress: called a few times a second with elapsed time and log line.
            timeout: seconds after which waiting is an error.

        Raises:
            ValueError: the server stopped or did not answer in time, with the cause.
        """
        start = time.monotonic()
        while not self._healthy():
            self.check_alive()
            elapsed = time.monotonic() - start
            if elapsed > timeout:
                raise ValueError(
                    f"the server was not ready after {timeout:.0f} s\n{self.why()}"
                )
            progress(elapsed, self.last_line())
            time.sleep(0.25)
        return time.monotonic() - start

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:  # not listening yet
            return False

    def check_alive(self) -> None:
        """Raise a ValueError with the cause if the process has ended."""
        assert self._process is not None, "use the server as a context manager"
        status = self._process.poll()
        if status is not None:
            raise ValueError(f"vllm serve ended with status {status}\n{self.why()}")

    @property
    def pid(self) -> int:
        """Process id of `vllm serve`, whose engine is one of its children."""
        assert self._process is not None, "use the server as a context manager"
        return self._process.pid

    def last_line(self) -> str:
        """The last line of the log, without vLLM's prefix."""
        lines = [line for line in self._tail(4096).splitlines() if line.strip()]
        return _PREFIX.sub("", lines[-1]).strip() if lines else "(no output yet)"

    def why(self) -> str:
        """The log's first own error and its last lines, for an error message."""
        lines = self._tail(200_000).splitlines()
        causes = [
            _PREFIX.sub("", line).strip()
            for line in lines
            if _ERROR.search(line)
            and not _SECOND_HAND.search(line)
            and not _HARMLESS.search(line)
        ]
        cause = f"cause: {causes[0]}\n" if causes else ""
        tail = "\n".join(f"  | {line}" for line in lines[-12:])
        return f"{cause}last lines of {self.log}:\n{tail}"

    def _tail(self, size: int) -> str:
        with self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - size))
            return file.read().decode(errors="replace")

    def metrics(self) -> Metrics:
        """Every sample of ``/metrics``: (name, sorted labels) to value."""
        return read_metrics(self.url)

    def wait(self) -> int:
        """Block until the process ends (for a server that is left running)."""
        assert self._process is not None, "use the server as a context manager"
        return self._process.wait()

    def stop(self, patience: float = 20.0) -> None:
        """Stop it and its workers: politely first, for certain in the end."""
        if self._process is None:
            return
        for sign, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
            if self._process.poll() is None:
                self._process.send_signal(sign)
                try:
                    self._process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue
        with contextlib.suppress(ProcessLookupError):  # no worker outlived it
            os.killpg(self._process.pid, signal.SIGKILL)


def read_metrics(url: str) -> Metrics:
    """Every sample of a server's ``/metrics``: (name, sorted labels) to value."""
    from prometheus_client.parser import text_string_to_metric_families

    time.sleep(SETTLE)
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): float(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """Sum of a metric's samples that have these labels; 0 where there is none."""
    return sum(
        value
        for (sample, found), value in metrics.items()
        if sample == name and set(labels.items()) <= set(found)
    )


def speculative_arguments(config: Mapping[str, Any] | None) -> list[str]:
    """`vllm serve` arguments for a speculative config, none for None."""
    return ["--speculative-config", json.dumps(config)] if config else []

"""Python processes that begin with vLLM imported.

Importing vLLM takes 17 seconds of a core, a server on CPU does it three times (API,
engine, worker), and the tests start dozens of processes. These are forks of one process
that imported it once and did nothing else; what they start is forked in turn. They have
their own environment, arguments, output, session and end, and load the plugin (or not)
by themselves.

What is decided while vLLM is imported, and what a spawned process lacks, cannot be
shown so. Real servers, each process with imports of its own, are started by
``test_matrix_server`` (the one with DSpark), ``test_chain`` and ``cli.test_demo``;
real processes by ``run_python(..., start="fresh")``.
"""

from __future__ import annotations

import array
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import pytest

from vllm_dspark.cli.server import Server

REPOSITORY = Path(__file__).parent.parent.parent
_MAIN = "tests.integration.forked_main"
# Read while modules are imported; a fork cannot change its mind.
_AT_IMPORT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@functools.cache
def _channel(kind: str) -> socket.socket:
    """To the process that forks; it ends when this socket is closed, with us."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        subprocess.Popen(
            [sys.executable, "-m", _MAIN, str(theirs.fileno()), kind],
            cwd=REPOSITORY,
            env=_clean(os.environ) | _AT_IMPORT | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    return ours


def _clean(environment: Mapping[str, str]) -> dict[str, str]:
    """Without what vLLM's platform and `vllm-dspark check` leave in a process."""
    return {k: v for k, v in environment.items() if k != "LD_PRELOAD"}


class Fork:
    """A running process; the part of `subprocess.Popen` that tests need.

    Args:
        argv: ``["-m", MODULE, ...]`` or ``["-c", CODE, ...]``.
        environment: all of it.
        kind: ``v1``, or ``v2`` for Triton's interpreter (`oracle.v2_patches`).
    """

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        out: IO[bytes],
        err: IO[bytes],
        kind: str = "v1",
    ) -> None:
        for name, value in _AT_IMPORT.items():
            if environment.get(name, value) != value:
                raise ValueError(f"{name}={environment[name]} in a fork of {value}")
        request = {
            "argv": list(argv),
            "environment": _clean(environment) | _AT_IMPORT,
            "cwd": str(REPOSITORY),
        }
        self._reply, theirs = socket.socketpair()
        fds = array.array("i", [theirs.fileno(), out.fileno(), err.fileno()])
        with theirs:
            _channel(kind).sendmsg(
                [json.dumps(request).encode()],
                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)],
            )
        self._lines = self._reply.makefile("r")
        first = self._lines.readline()
        if not first:
            raise RuntimeError("the process that forks has ended; see its errors above")
        self.pid = int(first)
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Exit status, negative for a signal; `subprocess.TimeoutExpired` before."""
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._reply, selectors.EVENT_READ)
                if not selector.select(timeout):
                    raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
            self.returncode = int(self._lines.readline())
            self._reply.close()
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, sign: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sign)

    def kill(self) -> None:
        """It and what it started."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)


class ForkedServer(Server):
    """`vllm serve` whose processes begin with vLLM imported."""

    def __enter__(self) -> Self:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as output:
            self._process = Fork(  # type: ignore[assignment]
                self.command[1:], self._environment, output, output
            )
        return self


def serve_in_forks(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str = "Server"
) -> None:
    """Servers that a module starts in this process (by a class of that name) are forks,
    whatever other tests have left in the environment."""
    kind = getattr(module, name)
    forked = ForkedServer if kind is Server else type(name, (ForkedServer, kind), {})
    monkeypatch.setattr(module, name, forked)
    for variable, value in _AT_IMPORT.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")

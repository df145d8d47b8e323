"""The process that imports vLLM once and forks for each run (see `forks`).

``python -m tests.integration.forked_main CHANNEL KIND``: requests come as messages of
JSON over the socket with that descriptor. A run has a supervisor of its own, which
tells its process id and how it ended. When the socket's other end is closed, all end.
"""

from __future__ import annotations

import array
import atexit
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from types import ModuleType
from typing import Any

MESSAGE = 1 << 20
MODULES = (
    "vllm",
    "vllm.entrypoints.llm",
    "vllm.entrypoints.cli.main",
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
)
SERVER_MODULES = (
    "vllm.entrypoints.cli.serve",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "xgrammar",
)


def serve(channel: socket.socket) -> None:
    """Fork for every request until nobody is left to make one."""
    while True:
        data, ancillary, *_ = channel.recvmsg(MESSAGE, socket.CMSG_SPACE(4 * 8))
        if not data:
            return
        (fds,) = (array.array("i", raw) for *_, raw in ancillary)
        if os.fork() == 0:
            channel.close()
            supervise(json.loads(data), *fds)
        for fd in fds:
            os.close(fd)


def supervise(request: dict[str, Any], reply: int, out: int, err: int) -> None:
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        os.write(reply, f"{os.getpid()}\n".encode())
        os.close(reply)
        run(request, out, err)
    for fd in (out, err):
        os.close(fd)
    _, status = os.waitpid(pid, 0)
    os.write(reply, f"{os.waitstatus_to_exitcode(status)}\n".encode())
    os._exit(0)


def run(request: dict[str, Any], out: int, err: int) -> None:
    """Become what a fresh ``python -m MODULE`` or ``python -c CODE`` would be."""
    end_with_parent(signal.SIGTERM)
    for fd, place in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)):
        os.dup2(fd, place)
        os.close(fd)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    multiprocessing.get_context = fork_instead  # type: ignore[assignment]
    os.register_at_fork(after_in_child=choose_metrics)
    code = 1
    try:
        execute(*request["argv"])
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def execute(option: str, what: str, *arguments: str) -> None:
    if option == "-m":
        sys.argv = [what, *arguments]
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.argv = ["-c", *arguments]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)


def fork_instead(method: str | None = None) -> Any:
    """vLLM wants its processes spawned on CPUs, because OpenMP's threads do not survive
    a fork. Here each has one thread, and a spawned one imports vLLM again."""
    return contexts("fork" if method == "spawn" else method)


contexts = multiprocessing.get_context


def choose_metrics() -> None:
    """What prometheus_client decides when it is imported: one process, or several that
    count into files (API servers are told so by the environment)."""
    from prometheus_client import values

    values.ValueClass = values.get_value_class()


def end_with_parent(sign: int) -> None:
    ctypes.CDLL(None).prctl(1, sign)  # PR_SET_PDEATHSIG


def main(fd: str, kind: str) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors need no burial
    if kind == "v2":
        from tests.integration.oracle import v2_patches

        v2_patches.install()
    for name in (*MODULES, *(SERVER_MODULES if kind == "v1" else ())):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # otherwise each fork's first collection copies all pages
    serve(socket.socket(fileno=int(fd)))
    os._exit(0)  # without what modules say at a proper end


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Python code in a process of its own: a fork with vLLM imported, or a fresh one for
what is decided while vLLM is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

from tests.integration.forks import REPOSITORY, Fork

TIMEOUT = 300
# Set in the test process by `vllm-dspark check` and by vLLM's CPU platform.
LEFT_BY_OTHER_TESTS = ("VLLM_LOGGING_LEVEL", "LD_PRELOAD")


def run_module(
    module: str, *arguments: Any, timeout: float, plugins: str | None = None
) -> None:
    """Run a module of the tests in Triton's interpreter; its results are files.

    Args:
        module: its name, as for ``python -m``.
        arguments: made into strings.
        timeout: seconds.
        plugins: ``VLLM_PLUGINS``; "" is vLLM alone, None lets all plugins in.

    Raises:
        AssertionError: it failed; the end of its errors is in the message.
    """
    others = (*LEFT_BY_OTHER_TESTS, "VLLM_PLUGINS", "OMP_NUM_THREADS")
    env = {k: v for k, v in os.environ.items() if k not in others}
    if plugins is not None:
        env["VLLM_PLUGINS"] = plugins
    argv = ["-m", module, *map(str, arguments)]
    done = _run(argv, env, timeout, kind="v2")
    assert done.returncode == 0, done.stderr[-4000:]


def _run(
    argv: list[str], env: Mapping[str, str], timeout: float, kind: str
) -> subprocess.CompletedProcess[str]:
    """In a fork, as `subprocess.run` would with the output captured."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        fork = Fork(argv, env, out, err, kind)
        try:
            status = fork.wait(timeout)
        finally:
            fork.kill()
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return subprocess.CompletedProcess(argv, status, *texts)


def run_python(
    code: str, *arguments: Any, start: str = "v1", **environment: str | None
) -> Any:
    """The JSON that the code prints in a line of its own."""
    return run_python_with_output(code, *arguments, start=start, **environment)[0]


def run_python_with_output(
    code: str, *arguments: Any, start: str = "v1", **environment: str | None
) -> tuple[Any, str]:
    """Run code; the JSON of its last line with any, and everything it printed.

    Args:
        code: reads its arguments from ``sys.argv[1:]``.
        arguments: made into strings.
        start: the kind of fork (see `forks.Fork`), or ``fresh`` for none.
        environment: changes to the environment; None removes a variable.

    Raises:
        AssertionError: it failed; its output is in the message.
    """
    env = {
        **{k: v for k, v in os.environ.items() if k not in LEFT_BY_OTHER_TESTS},
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    for name, value in environment.items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = value
    argv = ["-c", code, *map(str, arguments)]
    if start == "fresh":
        done = subprocess.run(
            [sys.executable, *argv],
            env=env,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
    else:
        done = _run(argv, env, TIMEOUT, kind=start)
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-6000:]
    # Engines may log their shutdown after the result.
    for line in reversed(done.stdout.splitlines()):
        if line[:1] in ("{", "[", '"'):
            return json.loads(line), output
    raise AssertionError(f"no JSON in:\n{output}")

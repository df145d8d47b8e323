"""One pass of `vllm_own_tests`: pytest over files, each in a fork of a warm process.

    python _own_tests_pass.py JOB.json  # written by vllm_own_tests.py

vLLM is imported once (that costs more than most files' tests), before any plugin is
loaded; each file has a process of its own, as tests leave state behind. vLLM loads
plugins when an engine starts, which a unit test never does: here they are loaded before
a file's tests, and ``VLLM_PLUGINS`` says which.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.metadata
import inspect
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

HUB_ENGINE = "starts an engine or a server with a model of the hub"
# What a test, its fixtures or a function of its module calls for that.
STARTERS = (
    "RemoteOpenAIServer(",
    "VllmRunner(",
    "LLM(",
    "AsyncLLM.from_",
    "LLMEngine.",
)
STARTER_FIXTURES = frozenset({"vllm_runner", "hf_runner"})
WARM = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.openai.api_server",
    "vllm.v1.engine.async_llm",
    "vllm.v1.worker.gpu_model_runner",
    "openai.types.responses",
    "tests.conftest",
    "tests.utils",
)
END = "the file's end"


class Recorder:
    """A pytest plugin: a line of JSON for each test that ends."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def write(self, test: str, outcome: str, why: str = "") -> None:
        with self.file.open("a") as out:
            print(json.dumps([test, outcome, why]), file=out)

    def pytest_sessionstart(self) -> None:
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        loaded = "vllm_dspark.integration.patches" in sys.modules
        self.write("", "loaded" if loaded else "not loaded")

    def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
        for item in items:
            if starts_engine(item):
                item.add_marker(pytest.mark.skip(reason=HUB_ENGINE))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.write(report.nodeid, "not collected", reason(report))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            failed = "failed" if report.when == "call" else "error"
            outcome = failed if report.outcome == "failed" else report.outcome
            self.write(report.nodeid, outcome, reason(report))


def starts_engine(item: pytest.Function) -> bool:
    """Whether its code, its fixtures' or its module's functions that it names do so."""
    names = set(getattr(item, "fixturenames", ()))
    if names & STARTER_FIXTURES:
        return True
    info = getattr(item, "_fixtureinfo", None)
    fixtures = info.name2fixturedefs if info is not None else {}
    functions = [item.function, *(d[-1].func for d in fixtures.values())]
    sources = [source(function) for function in functions]
    sources += [
        source(helper)
        for name, helper in vars(item.module).items()
        if inspect.isfunction(helper)
        and helper.__module__ == item.module.__name__
        and any(f"{name}(" in text for text in sources)
    ]
    return any(starter in text for text in sources for starter in STARTERS)


@functools.cache
def source(function: Any) -> str:
    """Its text, without decorators' folding; nothing where there is none."""
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


def reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """The exceptions' lines of a failure, the reason of a skip."""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    lines = report.longreprtext.splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return "\n".join(errors or lines[-3:])[:2000]


def run_file(file: str, out: Path, test_limit: int) -> None:
    """In the fork: pytest over one file; its output beside the results."""
    os.setpgid(0, 0)
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    arguments = ["-q", "-rN", "-p", "no:cacheprovider", "-p", "no:xdist"]
    limit = [f"--timeout={test_limit}"]
    status = pytest.main([*arguments, *limit, file], plugins=[Recorder(out)])
    sys.stdout.flush()
    os._exit(int(status))


def wait(process: int, seconds: float) -> str:
    """How the fork ended; what is left of it after that long is killed."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            kill(process)
            code = os.waitstatus_to_exitcode(status)
            return "ended" if code >= 0 else f"killed by signal {-code}"
        time.sleep(0.05)
    kill(process)
    os.waitpid(process, 0)
    return f"stopped after {seconds:.0f} s"


def kill(group: int) -> None:
    """Ends the processes that the file's tests left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def outcome_file(folder: Path, file: str) -> Path:
    """Where the outcomes of a test file are."""
    return folder / (file.replace("/", "__") + ".jsonl")


def is_done(out: Path) -> bool:
    return out.exists() and json.dumps(END) in out.read_text()


def main() -> None:
    """The job: {"files", "out", "file_limit", "test_limit"}; cwd holds tests/.

    A file that an earlier run with the same folder has done is not run again.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, str(Path.cwd()))
    for module in WARM:
        importlib.import_module(module)
    for plugin in importlib.metadata.entry_points(group="pytest11"):
        plugin.load()
    # vLLM's fixtures thaw everything and collect garbage after each test: half a second
    # for what was imported here, which stays frozen.
    gc.freeze()
    gc.unfreeze = lambda: None
    for file in job["files"]:
        out = outcome_file(Path(job["out"]), file)
        if is_done(out):
            continue
        out.unlink(missing_ok=True)
        if (process := os.fork()) == 0:
            try:
                run_file(file, out, job["test_limit"])
            finally:
                os._exit(70)
        start = time.monotonic()
        end = wait(process, job["file_limit"])
        Recorder(out).write(END, end)
        print(f"{time.monotonic() - start:6.1f} s  {file}: {end}", flush=True)


if __name__ == "__main__":
    main()

"""A fork is like a fresh process, but that vLLM is imported in it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.forks import Fork

REPORT = """
import json, os, sys, vllm.plugins
print(json.dumps([sys.argv, os.environ["WORD"], "PATH" in os.environ, __name__]))
print(vllm.plugins.plugins_loaded, "vllm_dspark.plugin" in sys.modules)
"""


def run(tmp_path: Path, *argv: str, **environment: str) -> tuple[int, str, str]:
    """Status, output and errors."""
    out, err = tmp_path / "out", tmp_path / "err"
    with out.open("wb") as one, err.open("wb") as other:
        status = Fork(argv, environment, one, other).wait(60)
    return status, out.read_text(), err.read_text()


@pytest.mark.slow
def test_it_has_what_it_was_given_and_no_more(tmp_path: Path) -> None:
    status, out, err = run(tmp_path, "-c", REPORT, "a", WORD="b")
    assert (status, err) == (0, "")
    assert out == '[["-c", "a"], "b", false, "__main__"]\nFalse False\n'


@pytest.mark.slow
def test_its_end_is_told(tmp_path: Path) -> None:
    assert run(tmp_path, "-c", "import sys; sys.exit(3)")[0] == 3
    status, _, err = run(tmp_path, "-c", "raise ValueError('here')")
    assert status == 1 and err.endswith("ValueError: here\n")
    assert run(tmp_path, "-m", "json.tool", "nowhere")[0] == 2
    with (tmp_path / "out").open("wb") as out:
        fork = Fork(["-c", "import time; time.sleep(99)"], {}, out, out)
        with pytest.raises(subprocess.TimeoutExpired):
            fork.wait(0.01)
        assert fork.poll() is None and os.getsid(fork.pid) == fork.pid
        fork.send_signal(signal.SIGINT)
        assert fork.wait(60) == 1 and fork.poll() == 1
        fork = Fork(["-c", "import time; time.sleep(99)"], {}, out, out)
        fork.kill()
        assert fork.wait(60) == -signal.SIGKILL


def test_what_imports_have_read_cannot_be_changed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="OMP_NUM_THREADS=2 in a fork of 1"):
        run(tmp_path, "-c", "", OMP_NUM_THREADS="2")

"""Default configurations of the Triton kernels, compiled for GPUs: none spills.

In a process of its own, for one that interprets kernels can compile none.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
KERNELS = {
    "begin_kernel",
    "finish_kernel",
    "project_kernel",
    "rejection_kernel",
    "step_kernel",
    "topk_kernel",
    "v2_rejection_kernel",
}


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)
def test_no_default_configuration_spills(tmp_path: Path) -> None:
    file = tmp_path / "aot.json"
    command = [sys.executable, "benchmarks/aot_report.py", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(file.read_text())["rows"]
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for row in rows:
        assert 0 < row["registers"] <= 255, row
        assert row["spills"] == row["local_bytes"] == 0, row
        assert row["bytes_moved"] >= row["bytes_needed"] > 0, row

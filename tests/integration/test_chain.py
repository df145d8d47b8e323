"""From nothing but a target to a calibrated, evaluated drafter: every command once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.subprocesses import LEFT_BY_OTHER_TESTS, REPOSITORY
from tests.tiny import make_tiny_target, make_tiny_tokenizer
from vllm_dspark.calibration import file
from vllm_dspark.model.checkpoint import weights_hash

pytestmark = pytest.mark.slow


def vllm_dspark(*arguments: object) -> str:
    """Run a subcommand as a user does; what it said."""
    environment = {k: v for k, v in os.environ.items() if k not in LEFT_BY_OTHER_TESTS}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dspark.cli", *map(str, arguments)],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_whole_chain(tmp_path: Path) -> None:
    target = make_tiny_tokenizer(
        make_tiny_target(tmp_path / "target", disturbance=0.5, sharpness=0.5)
    )
    data, drafter, result = (tmp_path / n for n in ("data", "drafter", "result.json"))
    vllm_dspark(
        *("synthesize", "--target", target, "--out", data, "--samples", 48),
        *("--max-response-tokens", 32, "--enforce-eager"),
    )
    vllm_dspark(
        *("train", "--target", target, "--data", data, "--out", drafter),
        *("--preset", "tiny", "--steps", 60, "--sequences", 4, "--block-size", 4),
        *("--lr", 0.03, "--validation", 8, "--dtype", "float32"),
    )
    trained = json.loads((drafter / "dspark_training.json").read_text())
    assert trained["validation"]["tau"] > 1.0
    prompts = tmp_path / "prompts.jsonl"
    rows = [
        {"dataset": f"d{i % 2}", "messages": [{"role": "user", "content": f"go {i}"}]}
        for i in range(12)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ("--target", target, "--drafter", drafter, "--prompts", prompts)
    common += ("--engine", "torch", "--max-tokens", 48, "--temperature", 0)
    vllm_dspark("calibrate", *common, "--report", tmp_path / "report")
    # The reader that serving uses takes it for this very drafter.
    file.read(drafter / file.NAME, weights_hash(drafter))
    vllm_dspark("evaluate", *common, "--json", result)
    found = json.loads(result.read_text())
    assert set(found["datasets"]) == {"d0", "d1"}
    assert found["macro"]["tau"] > 1.0
    assert found["macro"]["rounds"] > 20
    said = vllm_dspark("check", "--target", target, "--drafter", drafter)
    assert "all is well" in said

"""The real demo pair: greedy float32 text equals vLLM's without speculation.

A small version of ``benchmarks/lossless.py`` that runs in CI, in every setting of it:
one stream, sixteen, prefix hits, chunked prefill, preemption. Tiny models cannot show
what only a 30-layer model with a 49,152-token vocabulary has: near-ties.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent.parent
PROMPTS = REPOSITORY / "tests" / "data" / "prompts.jsonl"


def demo_paths() -> dict[str, str]:
    """Target and drafter of the demo; prepares the target once (under a minute)."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_dspark.cli", "demo", "--paths"],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, done.stderr
    paths: dict[str, str] = json.loads(done.stdout.strip().splitlines()[-1])
    return paths


@pytest.mark.slow
def test_demo_model_is_lossless(tmp_path: Path) -> None:
    paths = demo_paths()
    report = tmp_path / "lossless.json"
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "lossless.py")]
    command += ["--target", paths["target"], "--drafter", paths["drafter"]]
    command += ["--prompts", str(PROMPTS), "--count", "12", "--tokens", "48"]
    command += ["--json", str(report)]
    done = subprocess.run(
        command,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind"},
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    results = json.loads(report.read_text())["results"]
    speculated = {k: v for k, v in results.items() if k != "no speculation"}
    assert len(speculated) == 5
    for name, facts in speculated.items():
        assert facts["different"] == [], name
        assert facts["tau"] > 1.2, name
    assert results["preemption"]["preemptions"] > 0
    assert results["prefix caching"]["prefix_cache_hits"] > 0

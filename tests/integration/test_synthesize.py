"""`vllm-dspark synthesize` with a real server: the ids are the target's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.integration.subprocesses import LEFT_BY_OTHER_TESTS, REPOSITORY
from tests.tiny import EOS, load_target, make_tiny_target, make_tiny_tokenizer
from vllm_dspark.train.manifest import read_manifest
from vllm_dspark.train.tokens import TokenSet, read_tokens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with a tokenizer; near-ties are rare and texts do end."""
    path = make_tiny_target(
        tmp_path_factory.mktemp("target"), disturbance=0.5, sharpness=0.5
    )
    return make_tiny_tokenizer(path)


def synthesize(target: Path, out: Path, *arguments: object) -> str:
    """Run the command in a process of its own; what it said."""
    environment = {k: v for k, v in os.environ.items() if k not in LEFT_BY_OTHER_TESTS}
    environment |= {
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    command = [sys.executable, "-m", "vllm_dspark.cli", "synthesize"]
    command += ["--target", target, "--out", out, "--enforce-eager", *arguments]
    done = subprocess.run(
        list(map(str, command)),
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def share_of_likeliest(target: Path, data: TokenSet) -> float:
    """How often a greedy response's token is the target's first choice."""
    import torch

    model = load_target(target)
    hits: list[bool] = []
    for i in np.flatnonzero(data.temperature == 0):
        tokens, prompt_len = data.sample(int(i))
        ids = torch.from_numpy(tokens.astype(np.int64))
        with torch.no_grad():
            best = model(ids[None]).logits[0].argmax(-1)
        hits += (best[prompt_len - 1 : -1] == ids[prompt_len:]).tolist()
    return float(np.mean(hits))


def test_end_to_end(target: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"row {i}"}]} for i in range(30)]
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    options = ["--prompts", prompts, "none", "--concurrency", 16]
    options += ["--temperatures", "0:1,1.0:1", "--max-response-tokens", 96]
    options += ["--max-prompt-tokens", 300, "--max-turn-tokens", 200]
    out = tmp_path / "data"
    summary = tmp_path / "summary.json"
    synthesize(target, out, *options, "--samples", 30)
    first = read_tokens(out)
    assert len(first) == 30
    said = synthesize(target, out, *options, "--samples", 50, "--json", summary)
    assert "going on" in said and "tokens/s" in said
    data = read_tokens(out)
    assert len(data) == 50
    assert (data.tokens[: len(first.tokens)] == first.tokens).all()
    assert {data.sources[s] for s in data.source} == {"prompts", "self"}
    # The server computes in bfloat16, the judge in float32: near-ties differ. Ids that
    # were shifted by one place would agree in a few of a hundred places.
    assert share_of_likeliest(target, data) > 0.9
    ended = 0
    for i in range(len(data)):
        tokens, prompt_len = data.sample(i)
        response = tokens[prompt_len:]
        assert EOS not in response[:-1]
        assert len(response) == 96 or response[-1] == EOS
        ended += response[-1] == EOS
    assert ended, "no text ended, so nothing was shown about the end token"
    counts = read_manifest(out).counts
    assert counts["truncated"] == 50 - ended
    assert json.loads(summary.read_text())["run"]["generated_tokens"] > 0

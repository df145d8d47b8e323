"""`vllm-dspark synthesize` with a real server: the ids are the target's own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.integration.forks import serve_in_forks
from tests.tiny import EOS, load_target, make_tiny_target, make_tiny_tokenizer
from vllm_dspark.cli import main
from vllm_dspark.cli import synthesize as command
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


@pytest.fixture
def synthesize(
    target: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """The command; it gives what it said."""
    serve_in_forks(monkeypatch, command)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")

    def run(out: Path, *arguments: object) -> str:
        asked = ["synthesize", "--target", target, "--out", out, "--enforce-eager"]
        assert main([*map(str, asked), *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return run


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


def test_end_to_end(
    target: Path, synthesize: Callable[..., str], tmp_path: Path
) -> None:
    rows = [{"messages": [{"role": "user", "content": f"row {i}"}]} for i in range(30)]
    prompts = tmp_path / "rows.jsonl"
    prompts.write_text("\n".join(map(json.dumps, rows)))
    options = ["--prompts", prompts, "none", "--concurrency", 16]
    options += ["--temperatures", "0:1,1.0:1", "--max-response-tokens", 96]
    options += ["--max-prompt-tokens", 300, "--max-turn-tokens", 200]
    out = tmp_path / "data"
    summary = tmp_path / "summary.json"
    synthesize(out, *options, "--samples", 30)
    first = read_tokens(out)
    assert len(first) == 30
    said = synthesize(out, *options, "--samples", 50, "--json", summary)
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

"""The V2 adapter, in vLLM's V2 runner under Triton's interpreter.

vLLM alone and vLLM with the plugin run the same jobs, each in a process of its own:

- nothing asked of us: texts, drafts, logits and confidences are the same bits;
- a calibration file: the same drafts, with the file's maps on the confidences;
- gated and rnn heads, and a reduced vocabulary that brings no ``lm_head``, neither of
  which vLLM's classes can run: drafts and confidences of the plain-torch drafter.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.oracle.history import TOLERANCE, Oracle, relative
from tests.integration.subprocesses import run_module
from tests.integration.test_oracle_v2 import (
    SETTINGS,
    VOCAB,
    same_key_norms,
    waves,
)
from tests.tiny import make_tiny_drafter, make_tiny_target
from vllm_dspark.calibration import file as calibration_file
from vllm_dspark.calibration.scaling import Scaling
from vllm_dspark.model.checkpoint import weights_hash

pytestmark = [pytest.mark.slow, pytest.mark.v2]

SAMPLED = {"draft_sample_method": "probabilistic"}
MAPS = {0.0: Scaling((1.5,) * 5, (-0.5,) * 5), 1.0: Scaling((0.8,) * 5, (0.3,) * 5)}


def run_jobs(
    folder: Path, name: str, jobs: list[dict], plugin: bool
) -> list[dict[str, Any]]:
    """Results of `oracle.v2_run`, with the plugin or without."""
    file, out = folder / f"{name}.json", folder / f"{name}.pt"
    file.write_text(json.dumps(jobs))
    run_module(
        "tests.integration.oracle.v2_run",
        *(file, out),
        timeout=600,
        plugins=None if plugin else "",
    )
    # The runs are told apart by the class that drafted, not by what was asked.
    results = torch.load(out)
    ours = {r["speculator"].startswith("vllm_dspark.") for r in results}
    assert ours == {plugin}
    return results


def write_maps(drafter: Path) -> None:
    rows = [
        {"request_temperature": t, "temperature": s.temperature, "bias": s.bias}
        for t, s in MAPS.items()
    ]
    content = {
        "schema": calibration_file.SCHEMA,
        "kind": calibration_file.KIND,
        "weights_hash": weights_hash(drafter),
        "settings": rows,
        "data": {"label": "made up"},
    }
    (drafter / calibration_file.NAME).write_text(json.dumps(content))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    folder = tmp_path_factory.mktemp("v2")
    make_tiny_target(folder / "llama", vocab_size=VOCAB)
    return folder


def job(folder: Path, name: str, spec: dict, temperatures: Any, **keys: Any) -> dict:
    drafter = make_tiny_drafter(folder / name, folder / "llama", **keys)
    return {
        "target": str(folder / "llama"),
        "drafter": str(same_key_norms(drafter)),
        "spec": spec,
        "settings": SETTINGS,
        "waves": waves(temperatures, 10),
    }


def test_the_same_bits_and_calibrated_confidences(folder: Path) -> None:
    jobs = [
        job(folder, "greedy", {}, (0.0,)),
        job(folder, "sampled", SAMPLED, (0.6, 0.0, 1.5)),
    ]
    theirs = run_jobs(folder, "theirs", jobs, plugin=False)
    # With a scheduler of the user's the controller stays away: confidences are vLLM's
    # to use, and come calibrated.
    mapped = jobs[1]
    write_maps(Path(mapped["drafter"]))
    theirs_alone = "vllm.v1.core.sched.scheduler.Scheduler"
    mapped["settings"] = {**mapped["settings"], "scheduler_cls": theirs_alone}
    ours = run_jobs(folder, "ours", jobs, plugin=True)
    for one, their, our in zip(jobs, theirs, ours, strict=True):
        assert our["texts"] == their["texts"]
        same_blocks(our["blocks"], their["blocks"], confidences=one is not mapped)
    kinds = set()
    params = [row["params"] for wave in mapped["waves"] for row in wave]
    for a, b in zip(ours[1]["blocks"], theirs[1]["blocks"], strict=True):
        greedy = params[int(a["req_id"])]["temperature"] == 0
        kinds.add(greedy)
        raw = b["confidence"].double().numpy()[None]
        expected = MAPS[0.0 if greedy else 1.0].apply(raw)[0]
        np.testing.assert_allclose(a["confidence"].numpy(), expected, atol=1e-6)
        assert np.abs(expected - raw).max() > 1e-3
    assert kinds == {True, False}


def same_blocks(ours: list[dict], theirs: list[dict], confidences: bool) -> None:
    assert len(ours) == len(theirs) > 10
    for our, their in zip(ours, theirs, strict=True):
        assert our["drafts"] == their["drafts"]
        assert torch.equal(our["logits"], their["logits"])
        if confidences:
            assert torch.equal(our["confidence"], their["confidence"])


HEADS: dict[str, dict[str, Any]] = {
    "gated": {"head_type": "gated"},
    "rnn": {"head_type": "rnn"},
    "reduced": {
        "head_type": "rnn",
        "draft_vocab_size": 100,
        "with_lm_head": False,
        "confidence_with_markov": False,
    },
}


def test_heads_and_vocabularies_that_vllm_cannot_run(folder: Path) -> None:
    """Greedy, prompts in parts and prefix hits among them."""
    jobs = [job(folder, name, {}, (0.0,), **keys) for name, keys in HEADS.items()]
    for one, result in zip(jobs, run_jobs(folder, "heads", jobs, True), strict=True):
        oracle = Oracle(Path(one["target"]), Path(one["drafter"]))
        compared = 0
        for text in result["texts"]:
            features, best = oracle.target_run(text["tokens"])
            start = text["prompt_len"]
            assert text["tokens"][start:] == best[start - 1 : -1]
            blocks = [
                SimpleNamespace(**b)
                for b in result["blocks"]
                if b["req_id"] == text["req_id"]
                and b["anchor_position"] < len(text["tokens"]) - 1
            ]
            expected = oracle.recompute(text["tokens"], blocks, features)
            drafts = oracle.greedy_drafts(expected.logits)
            assert [b.drafts for b in blocks] == drafts
            logits = torch.stack([b.logits for b in blocks])
            confidence = torch.stack([b.confidence for b in blocks])
            assert relative(logits, expected.logits) < TOLERANCE
            assert relative(confidence, expected.confidence) < TOLERANCE
            compared += len(blocks)
        assert compared > 10

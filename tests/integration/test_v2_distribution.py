"""Sampled text on the V2 runner has the target's distribution where drafts are trimmed.

A target with 8 tokens is asked for three, on the real V2 runner in Triton's
interpreter (`oracle.v2_draws`); the draws are compared with the exact probabilities of
all texts (chi-square, joint and without the first token, which no draft can have
influenced). Once the scheduler trims the drafts that it waited for, once the device
does within a budget, by confidences that came with the tokens it may leave out. Every
setting is also held against another one, which the same draws must refute.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration import exact
from tests.integration.oracle.sizes import DRAWS, LENGTH, PROMPT, VOCAB, stairs
from tests.integration.subprocesses import run_module
from tests.integration.test_adaptive import cost_table
from tests.tiny import make_tiny_drafter, make_tiny_target

pytestmark = [pytest.mark.slow, pytest.mark.v2]

# A right sampler fails one test in ten thousand, with other seeds than this one.
ENOUGH, WRONG = 1e-4, 1e-6
# Refuted by 300 and by 1,000 of as many simulated sets of right draws.
OTHERS: dict[str, exact.Settings] = {
    "warm": {"temperature": 0.8},
    "top_k": {"temperature": 2.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    folder = tmp_path_factory.mktemp("v2-draws")
    target = make_tiny_target(folder / "target", vocab_size=VOCAB, sharpness=1.0)
    make_tiny_drafter(folder / "drafter", target)
    cost_table(folder, stairs)
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    out = folder / "out.json"
    run_module("tests.integration.oracle.v2_draws", folder, out, timeout=1200)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("where", ["host", "device"])
def test_drafts_were_trimmed_and_verified(result: dict[str, Any], where: str) -> None:
    found = result[where]
    name = {"host": "Trimming", "device": "AsyncBudget"}[where]
    assert found["scheduler"] == f"DSparkV2{name}Scheduler"
    assert found["trimmed"] > 100 and found["verified"] > 100
    assert found["lengths"] > 2 and found["accepted"] > 50


@pytest.mark.parametrize("setting", list(DRAWS))
@pytest.mark.parametrize("where", ["host", "device"])
def test_texts_have_their_probabilities(
    result: dict[str, Any], folder: Path, where: str, setting: str
) -> None:
    draws = [tuple(text) for text in result[where]["texts"][setting]]
    later = [text[1:] for text in draws]
    logits = exact.next_logits(folder / "target")
    right, wrong = (
        exact.enumerate_texts(logits, PROMPT, LENGTH, settings)
        for settings in (DRAWS[setting], OTHERS[setting])
    )
    assert exact.p_value(draws, right) > ENOUGH
    assert exact.p_value(later, exact.marginal(right, 1)) > ENOUGH
    assert exact.p_value(later, exact.marginal(wrong, 1)) < WRONG

"""Sampled text keeps the target's distribution where our controller trims on V2.

One process (`oracle.v2_sampled`) draws texts of three tokens from engines on vLLM's V2
runner in Triton's interpreter: drafts are sampled, confidences know the drafted tokens,
costs are jagged, and blocks of one step are trimmed to different lengths, by the
scheduler and by the device. The draws are held against the exact probabilities of all
texts (`exact`), with and without a grammar that drafts leave. Draws of a scheduler that
trims by the drafted token must fail: the test can.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.integration import exact
from tests.integration.subprocesses import run_module
from tests.integration.test_adaptive import cost_table, free
from tests.integration.test_oracle_v2 import same_key_norms
from tests.tiny import make_tiny_drafter, make_tiny_target, make_tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.v2]

VOCAB, DRAWS = 8, 512
PROMPT, LENGTH = [5, 4], 3  # as in `oracle.v2_sampled`
ALLOWED = list(range(3, 6))
# A right sampler fails one test in ten thousand, with other seeds than these.
ENOUGH, WRONG = 1e-4, 1e-6


def make_pair(folder: Path) -> Path:
    """Few tokens, and a drafter whose confidence tells them apart."""
    target = make_tiny_target(folder / "target", vocab_size=VOCAB, sharpness=1.0)
    make_tiny_tokenizer(target, VOCAB)
    drafter = make_tiny_drafter(
        folder / "drafter", target, num_layers=1, block_size=2, target_layer_ids=(0, 2)
    )
    same_key_norms(drafter)
    file = drafter / "model.safetensors"
    state = load_file(file)
    state["confidence_head.proj.weight"] *= 40
    save_file(state, file, metadata={"format": "pt"})
    cost_table(folder, free)  # replaced at once: only nothing is to be measured
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    return make_pair(tmp_path_factory.mktemp("v2-distribution"))


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    out = folder / "out.pt"
    run_module("tests.integration.oracle.v2_sampled", folder, out, DRAWS, timeout=600)
    return torch.load(out, weights_only=False)


def p_values(
    draws: list[tuple[int, ...]], folder: Path, **settings: Any
) -> list[float]:
    """Of whole texts, and of what drafts can have influenced."""
    right = exact.enumerate_texts(
        exact.next_logits(folder / "target"), PROMPT, LENGTH, settings
    )
    later = [text[1:] for text in draws]
    return [
        exact.p_value(draws, right),
        exact.p_value(later, exact.marginal(right, 1)),
    ]


SCHEDULERS = {
    "host": "DSparkV2TrimmingScheduler",
    "device": "DSparkV2AsyncBudgetScheduler",
}


@pytest.mark.parametrize("grammar", [False, True], ids=["free", "grammar"])
@pytest.mark.parametrize("where", SCHEDULERS)
def test_trimmed_drafts(
    result: dict[str, Any], folder: Path, where: str, grammar: bool
) -> None:
    found = result[where + " grammar" * grammar]
    assert found["scheduler"] == SCHEDULERS[where]
    assert found["trimmed"] > 0.1 * found["verified"] > 100
    assert len([n for n in found["verify_lens"].values() if n > 100]) >= 3
    assert 0.05 < found["accepted"] / found["verified"] < 0.95
    ids = {"allowed_token_ids": ALLOWED} if grammar else {}
    assert min(p_values(found["draws"], folder, temperature=1.0, **ids)) > ENOUGH
    assert min(p_values(found["draws"], folder, temperature=1.5, **ids)) < WRONG


def test_trimming_by_the_drafted_token_is_noticed(
    result: dict[str, Any], folder: Path
) -> None:
    found = result["biased"]
    assert len(found["draws"]) == DRAWS
    assert p_values(found["draws"], folder, temperature=1.0)[1] < WRONG

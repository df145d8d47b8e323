"""NaN while drafting: no drafts in that step, a counted warning, and the same text.

* NaN in draft logits, of one request or of all, in some steps: the others go on
  drafting, and the requests concerned draft again in the next step;
* NaN confidences likewise (a broken head must not steer a scheduler);
* NaN in one request's draft probabilities must not reach the sampling of another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engine import Engine, engine

PROMPTS = [[5, 9, 17, 33, 8], [7] * 3, list(range(3, 40)), [100, 50]]
Spoil = Callable[[torch.Tensor], None]


@pytest.fixture(scope="module")
def plain(tiny_target: Path) -> Iterator[Engine]:
    with engine(tiny_target) as plain:
        yield plain


@pytest.fixture(scope="module", params=["native", "reference"])
def dspark(
    request: pytest.FixtureRequest, tiny_target: Path, tiny_drafter: Path
) -> Iterator[Engine]:
    extra = {
        "spec": {"draft_sample_method": "probabilistic"},
        "additional_config": {"dspark": {"backend": request.param}},
    }
    with engine(tiny_target, tiny_drafter, **extra) as dspark:
        dspark.backend = request.param
        yield dspark


def params(**settings: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(max_tokens=30, ignore_eos=True, **settings)


class Spoiler:
    """Writes NaN into draft logits or hidden states in every third step."""

    def __init__(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, spoil: Spoil
    ) -> None:
        self.steps = self.spoiled = 0
        model = engine.runner.drafter.model
        base_logits = model.base_logits

        def spoiled(hidden: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            logits = base_logits(hidden)
            if self.steps % 3 == 0:
                self.spoiled += 1
                logits = logits.clone()
                spoil(logits)
            return logits

        monkeypatch.setattr(model, "base_logits", spoiled)


def all_nan(logits: torch.Tensor) -> None:
    logits.fill_(float("nan"))


def one_value(logits: torch.Tensor) -> None:
    """Of the first request, in its third draft."""
    logits[2, 17] = float("nan")


def last_row(logits: torch.Tensor) -> None:
    logits[-1] = float("nan")


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8}])
@pytest.mark.parametrize("spoil", [all_nan, one_value, last_row])
def test_draft_logits(
    plain: Engine,
    dspark: Engine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    spoil: Spoil,
    settings: dict[str, float],
) -> None:
    mixed = [params(**settings), params(temperature=0.0)] * 2
    expected = plain.tokens(PROMPTS, params(temperature=0.0))
    drafter, before = dspark.runner.drafter, dspark.stats()
    counted = drafter.nonfinite_drafts
    spoiler = Spoiler(dspark, monkeypatch, spoil)
    warnings: list[str] = []
    module = "vllm_dspark.integration.proposer.logger.warning"
    monkeypatch.setattr(module, lambda text, *args: warnings.append(text % args))
    found = dspark.tokens(PROMPTS, mixed)
    after = dspark.stats()
    assert spoiler.spoiled >= 2
    assert drafter.last_backend == dspark.backend
    # Greedy requests say what they would without drafts.
    rows = range(len(PROMPTS)) if settings["temperature"] == 0.0 else (1, 3)
    assert [found[i] for i in rows] == [expected[i] for i in rows]
    assert all(len(text) == 30 for text in found)
    assert all(0 <= token < 128 for text in found for token in text)
    # Counted and said; and the requests draft on afterwards.
    added = drafter.nonfinite_drafts - counted
    assert added >= spoiler.spoiled if spoil is all_nan else added == spoiler.spoiled
    assert len(warnings) == spoiler.spoiled
    assert f"({drafter.nonfinite_drafts} so far)" in warnings[-1]
    assert after.accepted > before.accepted


def test_confidences(
    plain: Engine, dspark: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A confidence head that has gone wrong after loading: nothing is drafted."""
    expected = plain.tokens(PROMPTS, params(temperature=0.0))
    drafter = dspark.runner.drafter
    weight = drafter.model.head.confidence_weight
    counted, kept = drafter.nonfinite_drafts, weight.clone()
    before = dspark.stats()
    weight[3] = float("nan")
    try:
        assert dspark.tokens(PROMPTS, params(temperature=0.0)) == expected
        assert drafter.nonfinite_drafts > counted
        assert dspark.stats().draft_tokens == before.draft_tokens
    finally:
        weight.copy_(kept)
    assert dspark.tokens(PROMPTS, params(temperature=0.0)) == expected
    assert dspark.stats().accepted > before.accepted

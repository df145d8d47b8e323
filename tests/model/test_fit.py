"""Whether a drafter belongs to a target: what differs is named with both numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import make_tiny_drafter
from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.checkpoint import load_config
from vllm_dspark.model.fit import TargetFacts, check_fit


@pytest.fixture
def drafter(tiny_drafter: Path) -> DrafterConfig:
    return load_config(tiny_drafter)


@pytest.fixture
def target(tiny_target: Path) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((tiny_target / "config.json").read_text())
    return raw


def test_its_own_target_fits(drafter: DrafterConfig, target: dict[str, Any]) -> None:
    check_fit(drafter, target)
    check_fit(drafter, TargetFacts.from_hf_config(target))


def test_nested_text_config_is_read(target: dict[str, Any]) -> None:
    nested = {"model_type": "some_vlm", "hidden_size": 1, "text_config": target}
    assert TargetFacts.from_hf_config(nested) == TargetFacts(64, 128, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 64, but the target given has 32"),
        ({"vocab_size": 256}, "vocab_size is 128, but the target given has 256"),
        ({"num_hidden_layers": 6}, "layers is 4, but the target given has 6"),
        ({"hidden_size": None}, "'hidden_size' is None"),
    ],
)
def test_another_target_is_refused(
    drafter: DrafterConfig,
    target: dict[str, Any],
    change: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        check_fit(drafter, {**target, **change})


def test_the_last_layer_is_refused(
    tmp_path: Path, tiny_target: Path, target: dict[str, Any]
) -> None:
    folder = make_tiny_drafter(tmp_path, tiny_target, target_layer_ids=(0, 3))
    with pytest.raises(ValueError, match=r"target's last layer \(3\).*up to 2"):
        check_fit(load_config(folder), target)

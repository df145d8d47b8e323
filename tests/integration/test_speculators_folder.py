"""Engines take a speculators folder as the drafter, and serve it as its DeepSpec twin.

vLLM builds another configuration class for such a folder (its keys come from
``transformer_layer_config``); what it left out or renamed would change the drafts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.engine import engine
from tests.integration.recorder import Block, greedy, prompt, recording, text_of
from tests.library_folder import make_library_folder, twin_of
from tests.tiny import edit_config, make_tiny_target

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vanilla": ("llama", {}),
    "gated, own everything": (
        "qwen3",
        {"head_type": "gated", "own_embeddings": True},
    ),
    "rnn, reduced": ("llama", {"head_type": "rnn", "draft_vocab_size": 90}),
    "window, biases": (
        "llama",
        {"sliding_window": 16, "overrides": {"attention_bias": True}},
    ),
    "rank 0, old rope key": (
        "qwen3",
        {
            "markov_rank": 0,
            "overrides": {"rope_parameters": None, "rope_theta": 5000.0},
        },
    ),
}


def drafted(target: Path, drafter: Path) -> tuple[list[list[int]], list[Block]]:
    """Texts, and every block of drafts, in order."""
    with engine(target, drafter) as eng, recording(eng.runner) as record:
        outputs = eng.generate([prompt(n) for n in (1, 30, 64)], greedy(24))
        texts = [text_of(output) for output in outputs]
    blocks = [block for text in texts for block in record.of(text)]
    return [text.output for text in texts], blocks


@pytest.mark.parametrize(("arch", "keys"), CASES.values(), ids=CASES.keys())
def test_served_as_its_twin(arch: str, keys: dict[str, Any], tmp_path: Path) -> None:
    target = make_tiny_target(tmp_path / "target", arch=arch)
    folder = make_library_folder(tmp_path / "lib", target, **keys)
    texts, blocks = drafted(target, folder)
    expected_texts, expected = drafted(target, twin_of(folder))
    assert texts == expected_texts
    assert len(blocks) == len(expected) > 10
    for one, other in zip(blocks, expected, strict=True):
        assert one.drafts == other.drafts
        assert torch.equal(one.hidden, other.hidden)
        assert (one.confidence is None) == (other.confidence is None)
        if one.confidence is not None and other.confidence is not None:
            assert torch.equal(one.confidence, other.confidence)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_from_anchor": False}, "'sample_from_anchor' is False"),
        ({"speculators_model_type": "eagle3"}, "only 'dspark' folders are read"),
        ({"aux_hidden_state_layer_ids": [0, 2, 9]}, "reads layer 8, but the target"),
    ],
)
def test_refused_before_the_start(
    change: dict[str, Any], message: str, tmp_path: Path, tiny_target: Path
) -> None:
    from vllm.engine.arg_utils import EngineArgs

    folder = make_library_folder(tmp_path / "lib", tiny_target)
    edit_config(folder, **change)
    with pytest.raises(ValueError, match=message):
        EngineArgs(
            model=str(tiny_target),
            skip_tokenizer_init=True,
            dtype="float32",
            max_model_len=256,
            speculative_config={"method": "dspark", "model": str(folder)},
        ).create_engine_config()

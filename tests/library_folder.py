"""Drafter folders as the speculators library (0.9.0) writes them, by hand.

Made from a tiny DeepSpec twin, but not with the code under test: which key stands where
was read off folders that the library itself saved.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.tiny import make_tiny_drafter
from vllm_dspark.model.checkpoint import load_state

# DeepSpec's keys that the library knows at the top, and those it does not know at all.
TOP = (
    "block_size",
    "mask_token_id",
    "markov_rank",
    "enable_confidence_head",
    "confidence_head_with_markov",
    "dtype",
)
UNKNOWN = ("architectures", "num_anchors", "num_target_layers", "target_layer_ids")
ELSEWHERE = ("draft_vocab_size", "markov_head_type")


def make_library_folder(path: Path, target: Path, **drafter: Any) -> Path:
    """Save a tiny drafter in the library's layout and its twin in ``path``-twin.

    Args:
        path: folder to write.
        target: the tiny target's folder.
        drafter: keys of `make_tiny_drafter`.
    """
    folder = make_tiny_drafter(twin_of(path), target, **drafter)
    raw = json.loads((folder / "config.json").read_text())
    state = load_state(folder)
    config = {key: raw[key] for key in TOP} | {
        "architectures": ["DSparkDraftModel"],
        "auto_map": {"": "config.DSparkSpeculatorConfig"},
        "aux_hidden_state_layer_ids": [i + 1 for i in raw["target_layer_ids"]],
        "draft_vocab_size": raw["draft_vocab_size"] or raw["vocab_size"],
        "markov_head_type": raw["markov_head_type"],
        "sample_from_anchor": True,
        "sliding_window_non_causal": False,
        "speculators_config": {
            "algorithm": "dspark",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "accept_tolerance": 0.0,
                    "proposal_type": "greedy",
                    "speculative_tokens": raw["block_size"],
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": {
                "architectures": ["LlamaForCausalLM"],
                "name_or_path": str(target),
            },
        },
        "speculators_model_type": "dspark",
        "speculators_version": "0.9.0",
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        "transformers_version": "5.19.0",
    }
    elsewhere = {*TOP, *UNKNOWN, *ELSEWHERE}
    layer = {key: value for key, value in raw.items() if key not in elsewhere}
    layer |= {"tie_word_embeddings": True, "use_cache": True}  # of the target
    config["transformer_layer_config"] = layer
    path.mkdir(parents=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (path / "config.json").write_text(text)
    if "d2t" in state:
        ids = state["d2t"] + torch.arange(len(state["d2t"]))
        state["t2d"] = torch.zeros(raw["vocab_size"], dtype=torch.bool)
        state["t2d"][ids] = True
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    return path


def twin_of(path: Path) -> Path:
    """The DeepSpec twin of a folder that `make_library_folder` saved."""
    return path.with_name(f"{path.name}-twin")

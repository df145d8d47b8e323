"""Tiny targets and drafters that draft for each other, built in milliseconds.

Random pairs accept nothing, and a constant text accepts everything; both hide bugs.
Here the target's next token mostly follows a fixed successor of the current one (its
LM head row of ``successor(t)`` is the embedding of t), which its random layers disturb
depending on the context. The drafter's Markov head knows the successors through unit
codes, and its own random layers disturb it too: greedy acceptance is neither 0 nor 1.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.tiny_weights import FIRST_TEXT as FIRST_TEXT
from tests.tiny_weights import drafter_state, fill_target
from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.checkpoint import save_checkpoint

MASK, BOS, EOS = 0, 1, 2
# Keys of the drafters' config.json that never vary.
_DRAFTER: dict[str, Any] = {
    "architectures": ["Qwen3DSparkModel"],
    "model_type": "qwen3",
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": False,
    "mask_token_id": MASK,
    "num_anchors": 4,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_TARGETS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def make_tiny_target(
    path: Path,
    *,
    arch: str = "llama",
    vocab_size: int = 128,
    hidden: int = 64,
    layers: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    disturbance: float = 1.5,
    sharpness: float = 1.5,
) -> Path:
    """Save a Hugging Face target with head size 32 (vLLM's CPU attention has it).

    Args:
        path: folder to write.
        arch: ``"llama"`` or ``"qwen3"``.
        disturbance: how much the layers say against the plain successor.
        sharpness: scale of the logits.
    """
    config_class, model_class = _TARGETS[arch]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
        rms_norm_eps=1e-6,
        dtype=str(dtype).removeprefix("torch."),
    )
    model = model_class(config)
    fill_target(model, seed, disturbance, sharpness)
    model.to(dtype).save_pretrained(path)
    return path


def load_target(path: Path) -> PreTrainedModel:
    """Load a saved target with eager attention, in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(
        path, attn_implementation="eager", dtype="auto"
    )
    return model.eval()


def make_tiny_drafter(
    path: Path,
    target_path: Path,
    *,
    head_type: str = "vanilla",
    markov_rank: int = 8,
    draft_vocab_size: int | None = None,
    own_embeddings: bool = False,
    with_lm_head: bool | None = None,
    confidence: bool = True,
    confidence_with_markov: bool = True,
    sliding_window: int | None = None,
    block_size: int = 5,
    num_layers: int = 2,
    target_layer_ids: tuple[int, ...] = (-1, 1, 2),
    dtype: torch.dtype = torch.float32,
    seed: int = 1,
    noise: float = 0.6,
    overrides: dict[str, Any] | None = None,
) -> Path:
    """Save a drafter (DeepSpec's layout) for a target of `make_tiny_target`.

    Args:
        path: folder to write.
        target_path: the target's folder.
        head_type: ``vanilla``, ``gated`` or ``rnn``; any with ``markov_rank`` 0 means
            no sequential head.
        draft_vocab_size: a reduced vocabulary, random text tokens.
        own_embeddings: bring embeddings (the target's, slightly changed).
        with_lm_head: bring an LM head; the same as ``own_embeddings`` if None.
        noise: scale of the backbone's say against the Markov head.
        overrides: more keys of config.json, e.g. ``{"attention_bias": True}``.
    """
    target = json.loads((target_path / "config.json").read_text())
    sliding = sliding_window is not None
    layer_type = "sliding_attention" if sliding else "full_attention"
    raw = _DRAFTER | {
        "vocab_size": target["vocab_size"],
        "draft_vocab_size": draft_vocab_size,
        "hidden_size": target["hidden_size"],
        "num_hidden_layers": num_layers,
        "layer_types": [layer_type] * num_layers,
        "sliding_window": sliding_window,
        "use_sliding_window": sliding_window is not None,
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": block_size,
        "target_layer_ids": list(target_layer_ids),
        "num_target_layers": target["num_hidden_layers"],
        "markov_rank": markov_rank,
        "markov_head_type": head_type,
        "enable_confidence_head": confidence,
        "confidence_head_with_markov": confidence_with_markov and markov_rank > 0,
    }
    raw.update(overrides or {})
    config = DrafterConfig.from_dict(raw)
    weights = load_file(target_path / "model.safetensors")
    state = drafter_state(config, weights, seed, noise)
    if not own_embeddings:
        del state["embed_tokens.weight"]
    if not (own_embeddings if with_lm_head is None else with_lm_head):
        del state["lm_head.weight"]
    floats = {k: v if k == "d2t" else v.to(dtype) for k, v in state.items()}
    save_checkpoint(path, raw, floats)
    return path


def edit_config(path: Path, **changes: Any) -> None:
    """Change keys of a folder's ``config.json``, right or wrong."""
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def make_tiny_tokenizer(path: Path, vocab_size: int = 128) -> Path:
    """Save an offline byte-level tokenizer with a chat template into a folder.

    Ids 0..2 are mask, start and end; then ASCII text, then pairs of letters.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<mask>", "<s>", "</s>"]
    ascii_text = [chr(i) for i in range(33, 127)] + ["Ġ", "Ċ", "ĉ"]
    pairs = [(a, b) for a in "etaoinshr" for b in "etaoinshr"]
    free = vocab_size - len(specials) - len(ascii_text)
    merges = pairs[: max(free, 0)]
    words = specials + ascii_text + [a + b for a, b in merges]
    words += [f"<extra_{i}>" for i in range(vocab_size - len(words))]
    vocab = {word: i for i, word in enumerate(words[:vocab_size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        chat_template=(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
    )
    fast.save_pretrained(path)
    return path

"""Tiny targets and drafters that draft for each other, built in milliseconds.

Random pairs accept nothing, and a constant text accepts everything; both hide bugs.
Here the target's next token mostly follows a fixed successor of the current one (its
LM head row of ``successor(t)`` is the embedding of t), which its random layers disturb
depending on the context. The drafter's Markov head knows the successors through unit
codes, and its own random layers disturb it too: greedy acceptance is neither 0 nor 1.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from vllm_dspark.config import DrafterConfig
from vllm_dspark.model.checkpoint import expected_shapes, save_checkpoint

MASK, BOS, EOS = 0, 1, 2
FIRST_TEXT = 3  # greedy text never leaves the ids from here on
_TARGETS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


def successors(vocab_size: int) -> Tensor:
    """The next token that the tiny target prefers: one cycle over all text tokens."""
    text = torch.arange(FIRST_TEXT, vocab_size)
    # A stride that is coprime with the cycle's length visits every token.
    stride = next(s for s in range(11, 10**6) if math.gcd(s, len(text)) == 1)
    nxt = torch.full((vocab_size,), FIRST_TEXT)
    nxt[FIRST_TEXT:] = FIRST_TEXT + (text - FIRST_TEXT + stride) % len(text)
    return nxt


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
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2:
                scale = weight.shape[1] ** -0.5
                if "o_proj" in name or "down_proj" in name:
                    scale *= disturbance
                _fill(weight, scale, generator)
        embeddings = model.model.embed_tokens.weight
        _fill(embeddings, 1.0, generator)
        _write_lm_head(model.lm_head.weight, embeddings, sharpness)
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
    vocab = target["vocab_size"]
    layer_type = "full_attention" if sliding_window is None else "sliding_attention"
    raw: dict[str, Any] = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "vocab_size": vocab,
        "hidden_size": target["hidden_size"],
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "attention_bias": False,
        "tie_word_embeddings": False,
        "layer_types": [layer_type] * num_layers,
        "sliding_window": sliding_window,
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": block_size,
        "mask_token_id": MASK,
        "target_layer_ids": list(target_layer_ids),
        "num_target_layers": target["num_hidden_layers"],
        "num_anchors": 4,
        "markov_rank": markov_rank,
        "enable_confidence_head": confidence,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    if markov_rank:
        raw["markov_head_type"] = head_type
    if confidence:
        raw["confidence_head_with_markov"] = confidence_with_markov and markov_rank > 0
    if draft_vocab_size is not None:
        raw["draft_vocab_size"] = draft_vocab_size
    raw.update(overrides or {})
    config = DrafterConfig.from_dict(raw)
    state = _drafter_state(config, target_path, seed, noise)
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


def _fill(weight: Tensor, scale: float, generator: torch.Generator) -> None:
    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)


def _write_lm_head(head: Tensor, embeddings: Tensor, sharpness: float) -> None:
    """Rows that point from each token to its successor; specials stay silent."""
    unit = embeddings / embeddings.norm(dim=1, keepdim=True)
    head.zero_()
    text = torch.arange(FIRST_TEXT, len(head))
    head[successors(len(head))[text]] = unit[text] * sharpness


def _drafter_state(
    config: DrafterConfig, target_path: Path, seed: int, noise: float
) -> dict[str, Tensor]:
    """Random weights with the successor codes written over the sequential head."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in expected_shapes(config).items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        state[name] = torch.randn(shape, generator=generator) * scale
        if name.endswith("norm.weight"):
            state[name] += 1.0
    # The final norm scales what the backbone says against the sequential head.
    state["norm.weight"] *= noise
    if config.enable_confidence_head:
        state["confidence_head.proj.weight"][:, : config.hidden_size] /= noise
    target = load_file(target_path / "model.safetensors")
    embeddings = target["model.embed_tokens.weight"].float()
    changed = torch.randn(embeddings.shape, generator=generator) * 0.05
    state["embed_tokens.weight"] = embeddings + changed
    rows = torch.arange(config.vocab_size)
    if config.has_reduced_vocab:
        shuffled = torch.randperm(config.vocab_size - FIRST_TEXT, generator=generator)
        rows = (shuffled[: config.draft_vocab_size] + FIRST_TEXT).sort().values
        state["d2t"] = rows - torch.arange(config.draft_vocab_size)
    state["lm_head.weight"] = target["lm_head.weight"].float()[rows]
    if config.markov_rank:
        _write_codes(state, config, rows, generator)
    return state


def _write_codes(
    state: dict[str, Tensor],
    config: DrafterConfig,
    rows: Tensor,
    generator: torch.Generator,
) -> None:
    """Unit code per token in W1, and its successor's row of W2 along that code."""
    rank, strength = config.markov_rank, 8.0
    codes = torch.randn((config.vocab_size, rank), generator=generator)
    codes /= codes.norm(dim=1, keepdim=True)
    bias = torch.zeros_like(codes)
    text = torch.arange(FIRST_TEXT, config.vocab_size)
    bias[successors(config.vocab_size)[text]] = codes[text] * strength
    state["markov_head.markov_w1.weight"] = codes
    state["markov_head.markov_w2.weight"] = bias[rows]
    if config.markov_head_type == "rnn":
        # Output part of the joint projection: pass the previous token's code on.
        joint = state["markov_head.joint_proj.weight"]
        joint[2 * rank :, rank : 2 * rank] += torch.eye(rank)


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

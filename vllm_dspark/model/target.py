"""Which target is this? Its folder, its dimensions, and a hash that names it.

Training data, drafters and calibrations are of use for one target only. They carry the
target's hash, which is made from its configuration and from the first bytes of every
tensor: milliseconds for a target of any size, and a fine-tuned target has another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_dspark.model.fit import TargetFacts
from vllm_dspark.model.headers import read_headers, read_json

CONFIG = "config.json"
_SAMPLE_BYTES = 4096  # of each tensor
# What decides the network's computation. Others (versions, paths, caches) change when
# a library saves the same model again; the hash must not.
_ARCHITECTURE_KEYS = (
    "architectures",
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "tie_word_embeddings",
    "num_experts_per_tok",
)


@dataclass(frozen=True, slots=True)
class TargetIdentity:
    """What an artefact remembers of the target that it was made with.

    Args:
        name: for people; two targets of one name are told apart by their hash.
        hash: of `target_hash`.
        vocab_size: rows of its LM head.
    """

    name: str
    hash: str
    vocab_size: int


def find_target(target: str | Path) -> Path:
    """The folder of a target: itself, or a name in the local Hugging Face cache.

    Raises:
        ValueError: neither a model folder nor a name in the cache.
    """
    folder = Path(target)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise ValueError(f"{folder} is no model folder: it has no {CONFIG}")
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(target), local_files_only=True))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"target {str(target)!r} is neither a model folder nor a name in the local "
            f"Hugging Face cache; download it first (`hf download {target}`)"
        ) from error


def read_target_facts(folder: str | Path) -> TargetFacts:
    """Dimensions of the target in a folder, from its ``config.json``.

    Raises:
        ValueError: the file is missing or lacks a dimension.
    """
    return TargetFacts.from_hf_config(_config(Path(folder)))


def target_hash(folder: str | Path) -> str:
    """SHA-256 (hex) that names the target in a folder.

    Counts: the architecture keys of ``config.json`` and, in the order of their names,
    every tensor's name, dtype, shape and first 4 KiB. How the tensors are split into
    files does not count, nor does what a library writes beside them.

    Raises:
        ValueError: no ``config.json``, or weights that are missing, truncated, corrupt
            or not safetensors.
    """
    path = Path(folder)
    config = _config(path)
    text: Mapping[str, Any] = config.get("text_config") or {}
    facts = {k: text.get(k, config.get(k)) for k in _ARCHITECTURE_KEYS}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, header in read_headers(path).items():
        digest.update(f"\n{name} {header.dtype} {header.shape}\n".encode())
        with header.file.open("rb") as stream:
            stream.seek(header.start)
            digest.update(stream.read(min(header.num_bytes, _SAMPLE_BYTES)))
    return digest.hexdigest()


def identify_target(target: str | Path) -> TargetIdentity:
    """Name, hash and vocabulary of a target (see `find_target` for what it may be).

    Raises:
        ValueError: as `find_target` and `target_hash`.
    """
    folder = find_target(target)
    # The cache's folders are named by commits; the name asked for says more.
    name = folder.resolve().name if Path(target).is_dir() else str(target)
    facts = read_target_facts(folder)
    return TargetIdentity(name, target_hash(folder), facts.vocab_size)


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no model folder: it has no {CONFIG}")
    return read_json(folder / CONFIG)

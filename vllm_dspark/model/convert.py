"""Writes a drafter's folder in the other layout: DeepSpec's or speculators'.

Tensors are copied bit by bit, the configuration without loss (see `speculators`), and
`checkpoint.weights_hash` stays what it was. Files beside them that belong to the
drafter, such as its calibration, go along.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vllm_dspark.config_reader import FROM_SPECULATORS
from vllm_dspark.model import checkpoint, speculators
from vllm_dspark.model.fit import TargetFacts, check_fit
from vllm_dspark.model.headers import INDEX, WEIGHTS, read_headers, read_json
from vllm_dspark.model.vocab_maps import D2T, T2D, check_target_map, target_map

DEEPSPEC, SPECULATORS = "deepspec", "speculators"
LAYOUTS = (DEEPSPEC, SPECULATORS)
_BESIDE = ("*.json", "*.md", "*.png", "LICENSE*")  # what belongs to a drafter


@dataclass(frozen=True, slots=True)
class Target:
    """The target, for what only one of the layouts says of it.

    Args:
        name: as vLLM and the library should load it.
        config: its ``config.json`` object.
    """

    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was written.

    Args:
        source_layout: one of `LAYOUTS`; ``layout``: the other one.
        weights_hash: of both folders.
        num_tensors: written, maps included; ``num_bytes``: their size.
        beside: names of the other files that were copied.
        notes: what others will miss in the folder.
    """

    source_layout: str
    layout: str
    weights_hash: str
    num_tensors: int
    num_bytes: int
    beside: tuple[str, ...]
    notes: tuple[str, ...]


def layout_of(folder: Path) -> str:
    """Which of `LAYOUTS` a drafter's folder is in.

    Raises:
        ValueError: ``config.json`` is missing or not a JSON object.
    """
    raw = read_json(folder / checkpoint.CONFIG)
    return SPECULATORS if speculators.is_speculators(raw) else DEEPSPEC


def convert(
    source: Path, out: Path, layout: str, target: Target | None = None
) -> Conversion:
    """Write a drafter's folder in another layout.

    Args:
        source: folder to read; it is checked as before an engine starts.
        out: folder to create; it appears when it is complete.
        layout: one of `LAYOUTS`.
        target: the drafter's target. DeepSpec's layout needs it unless the source
            knows its depth; speculators' names it for the library's own loader.

    Raises:
        ValueError: the source is broken, already in this layout or does not fit the
            target; a key or map cannot be expressed; ``out`` is in use.
    """
    source_layout = layout_of(source)
    if source_layout == layout:
        raise ValueError(f"{source} is in the {layout} layout already; nothing to do")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; name another one")
    state = checkpoint.load_state(source)
    if target is not None:
        check_fit(checkpoint.load_config(source), target.config)
    make = _to_deepspec if layout == DEEPSPEC else _to_speculators
    config, tensors = make(source, state, target)
    beside = _write(source, out, config, tensors)
    return Conversion(
        source_layout,
        layout,
        checkpoint.weights_hash(out),
        len(tensors),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
        beside,
        _notes(layout, config, tensors),
    )


def _notes(
    layout: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    if layout == DEEPSPEC:
        return ()
    notes = []
    if T2D in tensors and checkpoint.LM_HEAD not in tensors:
        notes.append(
            f"{checkpoint.LM_HEAD!r} is left out, as in the source: vllm-dspark takes "
            "its rows from the target, vLLM's own DSpark refuses such a folder"
        )
    if config["speculators_config"]["verifier"].get("name_or_path") is None:
        notes.append(
            "the target is not named (--target), so the speculators library will not "
            "fill in its embeddings and LM head"
        )
    return tuple(notes)


def _to_deepspec(
    source: Path, state: dict[str, Tensor], target: Target | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = source / checkpoint.CONFIG
    layers = None
    if target is not None:
        layers = TargetFacts.from_hf_config(target.config).num_hidden_layers
    config = speculators.to_deepspec(
        read_json(file),
        source=str(file),
        num_target_layers=layers,
        has_t2d=D2T not in state or T2D in read_headers(source),
    )
    if "num_target_layers" not in config:
        raise ValueError(
            f"{file}: the speculators layout does not say 'num_target_layers', which "
            "DeepSpec's must; name the target (--target)"
        )
    return config, state


def _to_speculators(
    source: Path, state: dict[str, Tensor], target: Target | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    file = source / checkpoint.CONFIG
    raw, verifier = read_json(file), None
    if target is not None:
        kinds = list(target.config.get("architectures") or [])
        verifier = {"name_or_path": target.name, "architectures": kinds}
    config = speculators.to_speculators(raw, source=str(file), verifier=verifier)
    if D2T not in state:
        return config, state
    vocab_size: int = raw["vocab_size"]
    check_target_map(state[D2T], None, vocab_size, str(source))
    if T2D in raw.get(FROM_SPECULATORS, {}).get("without", []):
        return config, state
    return config, {**state, T2D: target_map(state[D2T], vocab_size)}


def _write(
    source: Path, out: Path, config: dict[str, Any], tensors: dict[str, Tensor]
) -> tuple[str, ...]:
    """Fill a folder beside ``out`` and give it its name when all is well."""
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # As Hugging Face writes it, so that its own folders come back byte for byte.
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (partial / checkpoint.CONFIG).write_text(text)
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(kept, partial / WEIGHTS, metadata={"format": "pt"})
        beside = _copy_beside(source, partial)
        if checkpoint.weights_hash(partial) != checkpoint.weights_hash(source):
            raise ValueError(f"{partial}: what was written is not what was read")
        checkpoint.load_state(partial)
        partial.rename(out)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return beside


def _copy_beside(source: Path, folder: Path) -> tuple[str, ...]:
    files = {file for pattern in _BESIDE for file in source.glob(pattern)}
    names = {file.name for file in files if file.is_file()}
    names -= {checkpoint.CONFIG, WEIGHTS, INDEX}
    for name in names:
        shutil.copyfile(source / name, folder / name)
    return tuple(sorted(names))

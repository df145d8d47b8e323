"""Drafter folders: checking and loading them, and saving in DeepSpec's layout.

A folder holds ``config.json`` and safetensors weights under the names of `Drafter`.
``embed_tokens`` and ``lm_head`` may be left out: they are the target's then, and with
a reduced vocabulary the LM head's rows are the target's at the draft tokens. A reduced
vocabulary brings ``d2t`` ``[Vd]``, the offset from draft id to target id. Folders of
the speculators library are read as what they say in DeepSpec's (see `speculators`).

`check_checkpoint` reads headers only and is meant to run before an engine starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_dspark.config import DrafterConfig
from vllm_dspark.model import speculators
from vllm_dspark.model.drafter import Drafter
from vllm_dspark.model.fit import TargetFacts, check_fit
from vllm_dspark.model.headers import WEIGHTS, TensorHeader, read_headers, read_json
from vllm_dspark.model.vocab_maps import (
    D2T,
    T2D,
    check_offsets,
    check_target_map,
    check_target_map_header,
    draft_to_target_ids,
)

__all__ = [
    "OPTIONAL",
    "CheckpointFacts",
    "TargetFacts",
    "check_checkpoint",
    "check_fit",
    "draft_to_target_ids",
    "expected_shapes",
    "load_config",
    "load_drafter",
    "load_state",
    "read_config",
    "save_checkpoint",
    "weights_hash",
]

CONFIG = "config.json"
EMBEDDINGS = "embed_tokens.weight"
LM_HEAD = "lm_head.weight"
OPTIONAL = frozenset({EMBEDDINGS, LM_HEAD})  # left out, they are the target's
_FLOATS = ("F32", "BF16", "F16")
_INTS = ("I64", "I32")


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """What a drafter's folder holds.

    Args:
        config: its configuration.
        num_parameters: elements of all weights in the folder, ``d2t`` not counted.
        num_bytes: size of all tensors.
        has_embeddings: whether it brings its own embeddings.
        has_lm_head: whether it brings its own LM head.
    """

    config: DrafterConfig
    num_parameters: int
    num_bytes: int
    has_embeddings: bool
    has_lm_head: bool


def load_config(path: str | Path) -> DrafterConfig:
    """Read and check a drafter folder's ``config.json``.

    Raises:
        ValueError: missing, not JSON, or not a drafter we can run.
    """
    return DrafterConfig.from_dict(read_config(path), source=str(Path(path) / CONFIG))


def read_config(path: str | Path) -> dict[str, Any]:
    """A folder's ``config.json`` object in DeepSpec's layout, whichever it is in.

    Raises:
        ValueError: missing, not JSON, or a speculators folder of another kind.
    """
    file = Path(path) / CONFIG
    raw = read_json(file)
    if not speculators.is_speculators(raw):
        return raw
    return speculators.to_deepspec(raw, source=str(file))


def expected_shapes(config: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a checkpoint; those of `OPTIONAL` may be absent.

    Raises:
        ValueError: a tensor would have more elements than can be counted.
    """
    try:
        with torch.device("meta"):
            state = Drafter(config).state_dict()
    except RuntimeError as error:
        raise ValueError(f"no drafter can have these dimensions: {config}") from error
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if config.has_reduced_vocab:
        shapes[D2T] = (config.draft_vocab_size,)
    return shapes


def check_checkpoint(path: str | Path) -> CheckpointFacts:
    """Check a folder from its headers alone, in milliseconds.

    Raises:
        ValueError: config or weights are missing, truncated, corrupt or pickled, or
            a tensor is missing, unexpected or of the wrong shape or dtype.
    """
    config = load_config(path)
    headers = _checked_headers(Path(path), config)
    weights = [header for name, header in headers.items() if name != D2T]
    return CheckpointFacts(
        config=config,
        num_parameters=sum(header.num_elements for header in weights),
        num_bytes=sum(header.num_bytes for header in headers.values()),
        has_embeddings=EMBEDDINGS in headers,
        has_lm_head=LM_HEAD in headers,
    )


def load_state(path: str | Path) -> dict[str, Tensor]:
    """Read all tensors of a folder, checked, under the checkpoint's names.

    Raises:
        ValueError: as `check_checkpoint`; also NaN or infinite weights, and ``d2t``
            entries that leave the vocabulary or name a token twice.
    """
    config = load_config(path)
    headers = _checked_headers(Path(path), config)
    state: dict[str, Tensor] = {}
    for file in sorted({header.file for header in headers.values()}):
        try:
            state.update(load_file(file))
        except SafetensorError as error:
            raise ValueError(
                f"{file} is not read by safetensors ({error}); download the checkpoint "
                "again"
            ) from error
    mapping = state.pop(T2D, None)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{headers[name].file}: {name!r} holds NaN or infinite values; the "
                "drafter is broken, train or download it again"
            )
    if D2T in state:
        file = headers[D2T].file
        check_offsets(state[D2T], config.vocab_size, str(file))
        if _is_speculators(Path(path)):
            check_target_map(state[D2T], mapping, config.vocab_size, str(file))
    return state


def load_drafter(
    path: str | Path,
    *,
    target_embeddings: Tensor | None = None,
    target_lm_head: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Drafter:
    """Build the drafter of a folder, frozen and in evaluation mode.

    Args:
        path: the drafter's folder.
        target_embeddings: ``[V, d]``, used if the checkpoint has none.
        target_lm_head: ``[V, d]``, likewise.
        dtype: of the weights; what the config says if None.

    Raises:
        ValueError: as `load_state`; or embeddings or LM head are in neither place.
    """
    config, state = load_config(path), load_state(path)
    offsets = state.pop(D2T, None)
    mapping = None if offsets is None else draft_to_target_ids(offsets)
    shared = {EMBEDDINGS: target_embeddings, LM_HEAD: target_lm_head}
    for name in OPTIONAL - state.keys():
        tensor = shared[name]
        if tensor is None:
            raise ValueError(
                f"{path}: {name!r} is not in the checkpoint and no target was given "
                "to take it from"
            )
        use_rows = name == LM_HEAD and mapping is not None
        state[name] = tensor.detach()[mapping] if use_rows else tensor.detach()
    wanted = dtype or getattr(torch, config.dtype)
    with torch.device("meta"):
        drafter = Drafter(config)
    drafter.load_state_dict({k: v.to(wanted) for k, v in state.items()}, assign=True)
    drafter.draft_to_target = mapping
    return drafter.eval().requires_grad_(False)


def save_checkpoint(
    path: str | Path, config: Mapping[str, Any], state: Mapping[str, Tensor]
) -> None:
    """Write a drafter's folder and check what was written.

    Args:
        path: folder to create or to overwrite.
        config: the ``config.json`` object (see `DrafterConfig.from_dict`).
        state: tensors under the checkpoint's names, ``d2t`` as offsets.

    Raises:
        ValueError: config and tensors do not fit each other.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=1) + "\n")
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    check_checkpoint(folder)


def weights_hash(path: str | Path) -> str:
    """SHA-256 (hex) of a folder's tensors: the name artefacts know a drafter by.

    Names, dtypes, shapes and data count; how they are split into files does not, nor
    does ``t2d``, which repeats ``d2t``: a folder keeps its hash, and its calibration,
    when it is converted between DeepSpec's layout and the speculators library's.
    """
    digest = hashlib.sha256()
    for name, header in read_headers(Path(path)).items():
        if name == T2D:
            continue
        digest.update(f"{name} {header.dtype} {header.shape}\n".encode())
        with header.file.open("rb") as stream:
            stream.seek(header.start)
            digest.update(stream.read(header.num_bytes))
    return digest.hexdigest()


def _checked_headers(folder: Path, config: DrafterConfig) -> dict[str, TensorHeader]:
    headers = read_headers(folder)
    if T2D in headers:
        expect = config.has_reduced_vocab and _is_speculators(folder)
        check_target_map_header(headers.pop(T2D), config.vocab_size if expect else None)
    expected = expected_shapes(config)
    missing = sorted(expected.keys() - headers.keys() - OPTIONAL)
    if missing:
        raise ValueError(f"{folder}: {_some(missing)} missing from the weights")
    unexpected = sorted(headers.keys() - expected.keys())
    if unexpected:
        raise ValueError(
            f"{folder}: unexpected {_some(unexpected)} in the weights; is {CONFIG} of "
            "another checkpoint?"
        )
    for name, header in headers.items():
        if header.shape != expected[name]:
            raise ValueError(
                f"{header.file}: {name!r} has shape {list(header.shape)}; by {CONFIG} "
                f"it is {list(expected[name])}"
            )
        allowed = _INTS if name == D2T else _FLOATS
        if header.dtype not in allowed:
            raise ValueError(
                f"{header.file}: {name!r} has dtype {header.dtype}; expected one of "
                f"{', '.join(allowed)}"
            )
    return headers


def _is_speculators(folder: Path) -> bool:
    return speculators.is_speculators(read_json(folder / CONFIG))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(repr(name) for name in names[:3]) + more

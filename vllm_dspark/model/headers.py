"""Safetensors headers without the tensors: what a checkpoint's check needs, fast.

A file is an 8-byte little-endian length, that many bytes of JSON (name -> dtype,
shape, byte range), then the data. Reading only the headers takes milliseconds and
finds missing, truncated and corrupt files before an engine is started.
"""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_ITEM_SIZE = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "I32": 4, "BOOL": 1}
# Quantised targets have these; no drafter does.
_ITEM_SIZE |= {"F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """Where and what one tensor is.

    Args:
        dtype: the file's name for it, such as ``"BF16"``.
        shape: its dimensions.
        file: the file that holds it.
        start: its first byte, counted from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int

    @property
    def num_elements(self) -> int:
        """Product of the dimensions."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.num_elements * _ITEM_SIZE[self.dtype]


def read_headers(folder: Path) -> dict[str, TensorHeader]:
    """Headers of all tensors of a checkpoint folder, by name, sorted.

    Raises:
        ValueError: no safetensors file (a pickle is named, with the way out), or a
            file is missing, truncated or corrupt.
    """
    headers: dict[str, TensorHeader] = {}
    for file in _weight_files(folder):
        for name, header in _read_file(file).items():
            if name in headers:
                raise ValueError(
                    f"{file}: {name!r} is also in {headers[name].file.name}"
                )
            headers[name] = header
    return dict(sorted(headers.items()))


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: the file is missing or not a JSON object.
    """
    if not file.is_file():
        raise ValueError(
            f"{file} is missing; a drafter is a local folder with config.json and "
            f"{WEIGHTS}"
        )
    try:
        raw = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}, not a JSON object")
    return raw


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{folder / INDEX}: 'weight_map' is missing or empty")
        # Only names: an index must not lead out of its folder.
        names = {Path(str(name)).name for name in shards.values()}
        return [folder / name for name in sorted(names)]
    pickles = sorted(f.name for pattern in _PICKLES for f in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{folder}: {pickles[0]} is a pickle, which can run code when it is "
            f"loaded and is not read; convert it to {WEIGHTS} with "
            "safetensors.torch.save_file"
        )
    raise ValueError(f"{folder}: no weights; expected {WEIGHTS} or {INDEX}")


def _read_file(file: Path) -> dict[str, TensorHeader]:
    if not os.path.isfile(file):  # pathlib's raises for a name that is too long
        raise ValueError(f"{file} is missing; download the checkpoint again")
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise ValueError(
                f"{file} is truncated or not a safetensors file ({size} bytes); "
                "download the checkpoint again"
            )
        raw = stream.read(length)
    headers = {}
    for name, (header, end) in _parse(raw, file).items():
        _check_range(name, header, end, size)
        headers[name] = header
    return headers


def _parse(raw: bytes, file: Path) -> dict[str, tuple[TensorHeader, int]]:
    """Headers of a file and where each tensor's bytes are said to end."""
    data = 8 + len(raw)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        parsed = {}
        for name, entry in entries.items():
            start, end = (data + int(offset) for offset in entry["data_offsets"])
            shape = tuple(int(size) for size in entry["shape"])
            parsed[name] = TensorHeader(str(entry["dtype"]), shape, file, start), end
    # OverflowError: an offset of 1e999.
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"{file} has a corrupt safetensors header") from error
    return parsed


def _check_range(name: str, header: TensorHeader, end: int, size: int) -> None:
    if header.dtype not in _ITEM_SIZE:
        raise ValueError(
            f"{header.file}: {name!r} has dtype {header.dtype}; only "
            f"{', '.join(_ITEM_SIZE)} are read"
        )
    if header.start + header.num_bytes != end:
        raise ValueError(f"{header.file}: {name!r} has a shape unlike its byte range")
    if end > size:
        raise ValueError(
            f"{header.file} is truncated: {name!r} ends at byte {end} of {size}; "
            "download the checkpoint again"
        )

"""JSON files that a server may not die of: read with every check, written whole.

The calibration and the cost table are such files.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MAX_BYTES = 1 << 20


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The object that a file holds.

    Args:
        path: the file.
        what: what it should be, for the message about one that is far too large.

    Raises:
        ValueError: it cannot be read, is damaged, or holds something else.
    """
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise ValueError(f"{path}: {size} bytes are no {what}")
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is damaged, not text, so not JSON ({error.reason})"
        ) from error
    try:
        raw = json.loads(text)
    # ValueError: not JSON, or a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, not JSON ({error!s:.80})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: holds {type(raw).__name__}; expected an object")
    return raw


def write_object(
    path: Path, content: dict[str, Any], check: Callable[[Path], object]
) -> None:
    """Write a file as a whole or not at all.

    Args:
        path: the file.
        content: what it holds.
        check: reads it back before it takes its place, and raises if it would not do.

    Raises:
        ValueError: it is no JSON, or of ``check``.
        OSError: the folder cannot be written.
    """
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o644)
        check(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

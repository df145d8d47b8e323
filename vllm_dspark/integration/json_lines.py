"""A file to which JSON objects are appended, one a line, in whole blocks."""

from __future__ import annotations

import json
import os
from typing import Any

_BLOCK = 512  # lines kept before they are written


class JsonLines:
    """Appends to a file.

    Args:
        path: the file; created, or appended to (several processes may share it).

    Raises:
        OSError: of any method; what was kept is then lost.
    """

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lines: list[str] = []

    def add(self, **fields: Any) -> None:
        """Note one object."""
        self._lines.append(json.dumps(fields, allow_nan=False) + "\n")
        if len(self._lines) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write what is kept."""
        data = memoryview("".join(self._lines).encode())
        self._lines.clear()
        while len(data):
            data = data[os.write(self._file, data) :]

"""A file to which JSON objects are appended, one a line, in whole blocks."""

from __future__ import annotations

import json
import logging
import os
from typing import Any

_BLOCK = 512  # lines kept before they are written

logger = logging.getLogger("vllm_dspark")


class JsonLines:
    """Appends to a file; trouble with it is said once and ends it, not the server.

    Args:
        path: the file; created, or appended to (several processes may share it).
        what: it is, for that warning.

    Raises:
        OSError: it cannot be opened.
    """

    def __init__(self, path: str, what: str) -> None:
        self._name = f"{what} ends, {path}"
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._lines: list[str] = []
        self._ended = False

    def add(self, **fields: Any) -> None:
        """Note one object."""
        if self._ended:
            return
        self._lines.append(json.dumps(fields, allow_nan=False) + "\n")
        if len(self._lines) >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        """Write what is kept; it is lost where that fails."""
        data = memoryview("".join(self._lines).encode())
        self._lines.clear()
        try:
            while len(data):
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self._ended = True
            logger.warning("DSpark: the %s: %s", self._name, error)

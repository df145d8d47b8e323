"""A server class whose process is the fake in fake_vllm.py."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_dspark.cli.server import Server

FAKE = Path(__file__).parent / "fake_vllm.py"


@pytest.fixture
def fake_server(tmp_path: Path) -> Callable[[str], Server]:
    """Build a `Server` that runs the fake in a given mode."""

    def build(mode: str) -> Server:
        server = Server("model", [], tmp_path / f"{mode}.log")
        server.command = [sys.executable, str(FAKE), str(server.port), mode]
        return server

    return build

"""Tiny pairs and engines for tests inside vLLM."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports torch: see `tests.integration.engine`.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pair with 24 tokens, few enough to enumerate what the target may say."""
    from tests.tiny import make_tiny_drafter, make_tiny_target

    folder = tmp_path_factory.mktemp("small-pair")
    target = make_tiny_target(folder / "target", vocab_size=24, sharpness=1.0)
    return target, make_tiny_drafter(folder / "drafter", target)

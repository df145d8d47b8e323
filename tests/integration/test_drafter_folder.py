"""Where the drafter's files come from: a folder, or a repository of the hub.

The hub itself cannot be reached from tests: what is asked of it and what becomes of
its errors can.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from vllm_dspark.integration.config import drafter_folder


def test_a_folder_is_used_as_it_is(tmp_path: Path) -> None:
    spec = SimpleNamespace(model=str(tmp_path), revision=None)
    assert drafter_folder(spec) == str(tmp_path)


def test_a_repository_is_fetched_without_anything_executable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetch(name: str, **kwargs: Any) -> str:
        asked.append((name, kwargs))
        return "/cache/there"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    spec = SimpleNamespace(model="someone/drafter", revision="v2")
    assert drafter_folder(spec) == "/cache/there"
    patterns = ["*.json", "*.safetensors"]
    expected = {"revision": "v2", "allow_patterns": patterns}
    assert asked == [("someone/drafter", expected)]


@pytest.mark.parametrize("name", ["no/such-repository", None])
def test_what_cannot_be_had_is_named(
    name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ValueError, match="neither a folder nor a repository") as error:
        drafter_folder(SimpleNamespace(model=name, revision=None))
    assert repr(name) in str(error.value)

"""The provenance record: complete, JSON, and honest about what is not known."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_dspark import provenance


def test_record_is_json_and_names_the_run():
    record = json.loads(json.dumps(provenance.collect(["bench", "--x"])))
    assert record["command"] == ["bench", "--x"]
    assert record["versions"].keys() == set(provenance.PACKAGES)
    assert record["versions"]["vllm-dspark"]
    assert record["machine"]["cores"] >= 1 and record["machine"]["memory_gib"] > 0
    assert record["time_utc"].endswith("+00:00")


def test_the_command_defaults_to_this_process(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "x"])  # no folders in it
    assert provenance.collect()["command"] == ["python", "-m", "x"]


def test_folders_of_this_machine_are_left_out():
    command = [f"{Path.home()}/models/x", f"--out={Path.cwd()}/y"]
    assert provenance.collect(command)["command"] == ["~/models/x", "--out=./y"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a copy of the module in it, committed."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    package = tmp_path / "vllm_dspark"
    package.mkdir()
    (package / "provenance.py").write_text("# a copy\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
    git(tmp_path, *who, "commit", "-q", "-m", "one")
    return package


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_commit_and_dirty_flag(checkout: Path):
    sha = git(checkout, "rev-parse", "HEAD").strip()
    assert provenance._git(checkout) == {"sha": sha, "dirty": False}
    (checkout / "provenance.py").write_text("# changed\n")
    assert provenance._git(checkout) == {"sha": sha, "dirty": True}


def test_an_installed_copy_does_not_claim_the_repository_around_it(checkout: Path):
    site = checkout / "site-packages"
    site.mkdir()
    (site / "provenance.py").write_text("# installed, not committed\n")
    assert provenance._git(site) is None


def test_unknown_distributions_are_none():
    assert provenance._version("no-such-distribution-here") is None

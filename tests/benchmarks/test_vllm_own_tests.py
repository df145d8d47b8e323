"""`vllm_own_tests`: what it reads, compares and counts; one small run of its own."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import _own_tests_pass as one_pass
import pytest
import vllm_own_tests as own

PASSED, FAILED = ("passed", ""), ("failed", "assert 1 == 2")


def test_a_test_with_another_outcome_is_a_difference_and_no_other_is() -> None:
    without = {"a": PASSED, "b": FAILED, "c": PASSED, "d": ("skipped", "no GPU")}
    same = {**without, "d": ("skipped", "another text")}
    assert own.compare(without, same) == {}
    worse = {"a": FAILED, "b": PASSED, "d": without["d"], "e": PASSED}
    assert own.compare(without, worse) == {
        "a": ("passed", "failed: assert 1 == 2"),
        "b": ("failed: assert 1 == 2", "passed"),
        "c": ("passed", own.NOT_RUN),
        "e": (own.NOT_RUN, "passed"),
    }


def test_the_worst_phase_of_a_test_counts(tmp_path: Path) -> None:
    rows = [
        ("", "loaded", ""),
        ("a[0x7f01]", "passed", ""),
        ("a[0x7f01]", "error", "in its end"),
        ("b", "skipped", "why"),
        (own.END, "ended", ""),
    ]
    file = tmp_path / "0.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcomes = {"a[0x]": ("error", "in its end"), "b": ("skipped", "why")}
    assert own.read_run(file) == own.FileRun(outcomes, "loaded", "ended")
    nothing = own.FileRun({}, own.NOT_RUN, own.NOT_RUN)
    assert own.read_run(tmp_path / "none.jsonl") == nothing


@pytest.mark.parametrize(
    ("why", "kind"),
    [
        (f"Skipped: {own.HUB_ENGINE}", own.HUB_ENGINE),
        ("ModuleNotFoundError: No module named 'gpu'", "a package is missing"),
        (
            "OSError: couldn't find them in the cached files",
            "needs a file of the model hub",
        ),
        ("Skipped: requires CUDA", "needs a GPU or its kernels"),
        ("assert 1 == 2", own.OTHER),
    ],
)
def test_reasons(why: str, kind: str) -> None:
    assert own.why_not(why) == kind


def ended(outcomes: own.Outcomes) -> own.FileRun:
    return own.FileRun(outcomes, "loaded", "ended")


def test_counts_and_totals() -> None:
    without = {"f::a": PASSED, "f::b": FAILED, "f::c": ("skipped", "no CUDA")}
    worse = {**without, "f::a": FAILED}
    first = own.count_file(ended(without), ended(worse))
    assert first == {
        "passed_without": 1,
        "passed_with": 0,
        "do_not_apply": {own.OTHER: 1, "needs a GPU or its kernels": 1},
        "other_causes": {"b": "assert 1 == 2"},
    }
    second = own.count_file(ended({}), own.FileRun({}, "loaded", "stopped after 5 s"))
    assert second["ends"] == ["ended", "stopped after 5 s"]
    assert own.totals({"f": first, "g": second}) == {
        "files": 2,
        "files_that_apply": 1,
        "passed_without": 1,
        "passed_with": 0,
        "do_not_apply": first["do_not_apply"],
        "files_stopped": 1,
    }


def test_a_folder_without_tests_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--vllm-tests"):
        own.selected_files(tmp_path, ["v1"])


def test_a_file_that_hangs_is_stopped() -> None:
    if (process := os.fork()) == 0:
        os.setpgid(0, 0)
        time.sleep(60)
        os._exit(0)
    start = time.monotonic()
    assert one_pass.wait(process, 1) == "stopped after 1 s"
    assert time.monotonic() - start < 30


# A vllm of nothing, whose plugins are what VLLM_PLUGINS says.
FALSE_VLLM = {
    "vllm/entrypoints/llm.py": "",
    "vllm/entrypoints/openai/api_server.py": "",
    "vllm/v1/engine/async_llm.py": "",
    "vllm/v1/worker/gpu_model_runner.py": "",
    "openai/types/responses.py": "",
    "vllm/plugins/__init__.py": """
import os, sys
def load_general_plugins():
    if os.environ["VLLM_PLUGINS"]:
        sys.modules["vllm_dspark.integration.patches"] = sys
""",
}
TESTS = {
    "__init__.py": "",
    "conftest.py": "",
    "utils.py": "",
    "v1/test_a.py": """
import os, pytest
def helper(): LLM("a model of the hub")
@pytest.fixture
def server(): return RemoteOpenAIServer("another")
def test_same(): pass
def test_differs(): assert not os.environ["VLLM_PLUGINS"]
def test_engine(): helper()
def test_server(server): pass
""",
    "v1/test_first_only.py": """
import os, pathlib
def test():
    mark = pathlib.Path("mark-" + os.environ["VLLM_PLUGINS"])
    first = not mark.exists()
    mark.touch()
    assert not (first and os.environ["VLLM_PLUGINS"])
""",
    "v1/test_dies.py": "import os\ndef test(): os.kill(os.getpid(), 9)\n",
}


def write_files(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        # Otherwise the packages that are installed would win.
        while (file := file.parent) != folder:
            (file / "__init__.py").touch()


@pytest.mark.slow
def test_both_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole script on a vllm of nothing: a difference, one that does not come
    again, engines that are left out, a file that dies."""
    monkeypatch.setattr(own, "write_stand_in", Path.mkdir)
    write_files(tmp_path / "tests", TESTS)
    work, result = tmp_path / "work", tmp_path / "result.json"
    write_files(work / "root", FALSE_VLLM)
    command = ["own", "--vllm-tests", str(tmp_path / "tests"), "--work", str(work)]
    command += ["--files", "v1", "--json", str(result)]
    monkeypatch.setattr("sys.argv", command)
    assert own.main() == 1
    found = json.loads(result.read_text())
    a, first_only = "tests/v1/test_a.py", "tests/v1/test_first_only.py"
    assert list(found["differences"]) == [f"{a}::test_differs"]
    assert list(found["unsteady"]) == [f"{first_only}::test"]
    files = found["files"]
    assert files[a]["passed_without"] == 2 and files[a]["passed_with"] == 1
    assert files[a]["do_not_apply"] == {own.HUB_ENGINE: 2}
    assert files["tests/v1/test_dies.py"]["ends"] == ["killed by signal 9"] * 2
    assert found["totals"]["files_stopped"] == 1
    assert found["provenance"]["versions"]["vllm-dspark"]

"""vLLM's own tests, with and without the plugin: the same outcomes, test by test.

    python benchmarks/vllm_own_tests.py --vllm-tests vllm-0.32.0/tests --json FILE
    python benchmarks/vllm_own_tests.py --vllm-tests ... --files v1/core config

FOLDER is the ``tests`` folder of vLLM's source distribution of the version that is
installed; its tests need pytest-asyncio, pytest-timeout and tblib. They run offline on
a CPU, in a copy. Of the model hub there is one stand-in, made here: the configuration
of facebook/opt-125m, which the scheduler's tests ask for, without weights. A test that
cannot run so is counted by its reason. Files in which the passes differ run once more
in both: what differs again is a difference, the rest is unsteady. Exits with 1 if there
is a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _bench_common as common
from _own_tests_pass import END, HUB_ENGINE, is_done, outcome_file

REPOSITORY = Path(__file__).resolve().parent.parent
# Where speculative decoding, scheduling, sampling, the OpenAI API, plugins and
# configurations are tested, what concerns the plugin most first.
SELECTED = (
    "v1/spec_decode",
    "v1/sample",
    "v1/core",
    "entrypoints/openai",
    "plugins_tests",
    "config",
    "spec_decode",
    "v1/metrics",
    "v1/logits_processors",
    "v1/structured_output",
    "entrypoints/unit_tests",
    "test_config.py",
)
ARMS = {"without": "", "with": "dspark"}  # VLLM_PLUGINS of each pass
NOT_RUN = "not run"
STOPPED = "the file was stopped or died before it"
OTHER = "another cause"
# The first that the skip's or failure's text matches is why a test does not apply.
REASONS = (
    (HUB_ENGINE, re.escape(HUB_ENGINE)),
    (
        "a package is missing",
        r"No module named|ModuleNotFound|cannot import|not installed",
    ),
    (
        "needs a file of the model hub",
        r"offline|hugging ?face|\bhub\b|repository id|local(ly)? cached|cached files"
        r"|Entry ?NotFound|Can't load|Connection|resolve host|name resolution",
    ),
    (
        "needs a GPU or its kernels",
        r"cuda|\bgpus?\b|triton|kernel|nvidia|rocm|\bxpu\b|\btpu\b|accelerator|flash",
    ),
    ("optional in vLLM's own runs, too", r"optional|manual|\bslow\b"),
)
Outcomes = dict[str, tuple[str, str]]  # test to (outcome, why)
_WORST = ("passed", "skipped", "xfailed", "failed", "error", "not collected")


@dataclass(frozen=True)
class FileRun:
    """What a pass left of one file: each test's worst outcome, the plugin, the end."""

    outcomes: Outcomes
    plugin: str
    end: str


def read_run(file: Path) -> FileRun:
    """A file of `_own_tests_pass`; a file that is not there has not run."""
    outcomes: Outcomes = {}
    plugin = end = NOT_RUN
    lines = file.read_text().splitlines() if file.exists() else []
    for test, outcome, why in map(json.loads, lines):
        if test == END:
            end = outcome
        elif not test:
            plugin = outcome
        else:
            test = re.sub(r"0x[0-9a-f]+", "0x", test)
            before = outcomes.get(test, ("passed", ""))[0]
            if _WORST.index(outcome) >= _WORST.index(before):
                outcomes[test] = (outcome, why)
    return FileRun(outcomes, plugin, end)


def compare(without: Outcomes, with_plugin: Outcomes) -> dict[str, tuple[str, str]]:
    """Tests whose outcome is not the same: (without, with), each with its reason."""
    found = {}
    for test in sorted({*without, *with_plugin}):
        pair = without.get(test, (NOT_RUN, "")), with_plugin.get(test, (NOT_RUN, ""))
        if pair[0][0] != pair[1][0]:
            found[test] = tuple(": ".join(filter(None, side))[:300] for side in pair)
    return found


def why_not(why: str) -> str:
    """The kind of reason for which a test does not apply here."""
    for name, pattern in REASONS:
        if re.search(pattern, why, re.IGNORECASE):
            return name
    return OTHER


def count_file(without: FileRun, with_plugin: FileRun) -> dict[str, Any]:
    """A file's counts: passes with and without, and why the rest does not apply."""
    rest = {t: why for t, (o, why) in without.outcomes.items() if o != "passed"}
    counts: dict[str, Any] = {
        "passed_without": len(without.outcomes) - len(rest),
        "passed_with": sum(o == "passed" for o, _ in with_plugin.outcomes.values()),
        "do_not_apply": dict(Counter(map(why_not, rest.values())).most_common()),
    }
    if without.end != "ended" or with_plugin.end != "ended":
        counts["ends"] = [without.end, with_plugin.end]
    others = {t.split("::", 1)[-1]: w for t, w in rest.items() if why_not(w) == OTHER}
    if others:
        counts["other_causes"] = {t: w[:160] for t, w in sorted(others.items())[:5]}
    return counts


def totals(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the files; a file applies if a test of it passes without the plugin."""
    reasons: Counter[str] = Counter()
    for counts in files.values():
        reasons.update(counts["do_not_apply"])
    return {
        "files": len(files),
        "files_that_apply": sum(c["passed_without"] > 0 for c in files.values()),
        "passed_without": sum(c["passed_without"] for c in files.values()),
        "passed_with": sum(c["passed_with"] for c in files.values()),
        "do_not_apply": dict(reasons.most_common()),
        "files_stopped": sum("ends" in c for c in files.values()),
    }


class Passes:
    """Runs vLLM's tests in a copy of their folder, with a small stand-in of the hub."""

    def __init__(self, folder: Path, work: Path, args: argparse.Namespace) -> None:
        self.work, self.args = work, args
        self.root, self.hub = work / "root", work / "hub"
        shutil.copytree(folder, self.root / "tests", dirs_exist_ok=True)
        write_stand_in(self.hub)

    def run(self, files: list[str], look: str = "") -> dict[str, dict[str, FileRun]]:
        """Both passes at the same time: arm to file to what it left."""
        with ThreadPoolExecutor(len(ARMS)) as pool:
            done = pool.map(lambda arm: self.run_one(arm, files, look), ARMS)
            return dict(zip(ARMS, done, strict=True))

    def run_one(self, arm: str, files: list[str], look: str) -> dict[str, FileRun]:
        """One pass, in a folder of its own."""
        out = self.work / f"{arm}{look}"
        out.mkdir(exist_ok=True)
        limits = {"file_limit": self.args.limit, "test_limit": self.args.test_limit}
        job = out / "job.json"
        job.write_text(json.dumps({"files": files, "out": str(out), **limits}))
        worker = Path(__file__).with_name("_own_tests_pass.py")
        if not all(is_done(outcome_file(out, file)) for file in files):
            subprocess.run(
                [sys.executable, str(worker), str(job)],
                cwd=self.root,
                env=self.environment(arm),
                check=True,
            )
        return {file: read_run(outcome_file(out, file)) for file in files}

    def environment(self, arm: str) -> dict[str, str]:
        """Offline, on a CPU, and with one plugin more or less."""
        path = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path),
            "VLLM_PLUGINS": ARMS[arm],
            "HF_HOME": str(self.hub),
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }


def write_stand_in(hub: Path) -> None:
    """A hub's cache with OPT's configuration: transformers' defaults are opt-125m's."""
    from transformers import OPTConfig

    model = hub / "hub" / "models--facebook--opt-125m"
    (model / "refs").mkdir(parents=True, exist_ok=True)
    (model / "refs" / "main").write_text("stand-in")
    config = OPTConfig(architectures=["OPTForCausalLM"], dtype="float16")
    config.save_pretrained(model / "snapshots" / "stand-in")


def selected_files(folder: Path, chosen: Iterable[str]) -> list[str]:
    """Test files under the chosen files and folders.

    Raises:
        ValueError: there is none in one of them.
    """
    files = []
    for name in chosen:
        path = folder / name
        found = [path] if path.is_file() else sorted(path.rglob("test_*.py"))
        if not found:
            raise ValueError(f"no tests in {path}: give vLLM's tests as --vllm-tests")
        files += [str(Path("tests") / file.relative_to(folder)) for file in found]
    return list(dict.fromkeys(files))


def differences(runs: dict[str, dict[str, FileRun]], file: str) -> dict[str, Any]:
    return compare(*(runs[arm][file].outcomes for arm in ARMS))


def run_both(passes: Passes, files: list[str]) -> dict[str, Any]:
    """Both passes, the second look at what differs, and the counts.

    Raises:
        RuntimeError: the plugin was in where it should not be, or the reverse.
    """
    first = passes.run(files)
    plugin = {
        arm: {run.plugin for run in first[arm].values()} - {NOT_RUN} for arm in ARMS
    }
    if plugin != {"without": {"not loaded"}, "with": {"loaded"}}:
        raise RuntimeError(f"VLLM_PLUGINS did not decide on the plugin: {plugin}")
    found = {file: differences(first, file) for file in files}
    again = [file for file in files if found[file]]
    second = passes.run(again, "-again") if again else {}
    seen_again = {test for file in again for test in differences(second, file)}
    pairs = {test: pair for file in files for test, pair in found[file].items()}
    counted = {file: count_file(*(first[arm][file] for arm in ARMS)) for file in files}
    return {
        "totals": totals(counted),
        "differences": {t: pair for t, pair in pairs.items() if t in seen_again},
        "unsteady": {t: pair for t, pair in pairs.items() if t not in seen_again},
        "files": counted,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--vllm-tests", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--files", nargs="+", default=SELECTED, help="below FOLDER")
    parser.add_argument("--limit", type=int, default=120, help="seconds of a file")
    parser.add_argument("--test-limit", type=int, default=60, help="seconds of a test")
    parser.add_argument(
        "--work", type=Path, metavar="FOLDER", help="kept; a stopped run goes on there"
    )
    return parser.parse_args()


def main() -> int:
    """Runs, prints the totals, writes the file; 1 if a test's outcome differs."""
    args = arguments()
    files = selected_files(args.vllm_tests, args.files)
    with tempfile.TemporaryDirectory(prefix="vllm-own-tests-") as temporary:
        work = (args.work or Path(temporary)).resolve()
        result = run_both(Passes(args.vllm_tests, work, args), files)
    print(json.dumps({k: v for k, v in result.items() if k != "files"}, indent=1))
    common.write_json(args.json, result)
    return int(bool(result["differences"]))


if __name__ == "__main__":
    sys.exit(main())

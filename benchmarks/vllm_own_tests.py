"""vLLM's own tests, with and without the plugin: the same outcomes, test by test.

    python benchmarks/vllm_own_tests.py --vllm-tests vllm-0.32.0/tests --json FILE
    python benchmarks/vllm_own_tests.py --vllm-tests ... --files v1/core config

FOLDER is the ``tests`` folder of vLLM's source distribution of the version that is
installed; its tests need pytest, pytest-asyncio, pytest-timeout and tblib. They run
offline on a CPU, in a copy. Of the model hub there is one stand-in, made here: the
configuration of facebook/opt-125m, which the scheduler's tests ask for, without weights.
A test that cannot run so is counted by its reason. Files in which the passes differ run
once more in both: what differs again is a difference, the rest is unsteady. Exits with 1
if there is a difference.
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
from pathlib import Path
from typing import Any

import _bench_common as common
from _own_tests_pass import HUB_ENGINE

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
    ("a package is missing", r"No module named|ModuleNotFound|cannot import|not installed"),
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


def read_outcomes(file: Path) -> tuple[Outcomes, str]:
    """A pass's outcomes of one file, each test's worst, and whether the plugin was in."""
    outcomes: Outcomes = {}
    plugin = NOT_RUN
    lines = file.read_text().splitlines() if file.exists() else []
    for test, outcome, why in map(json.loads, lines):
        if not test:
            plugin = outcome
            continue
        test = re.sub(r"0x[0-9a-f]+", "0x", test)
        before = outcomes.get(test, ("passed", ""))[0]
        if _WORST.index(outcome) >= _WORST.index(before):
            outcomes[test] = (outcome, why)
    return outcomes, plugin


def compare(without: Outcomes, with_plugin: Outcomes) -> dict[str, tuple[str, str]]:
    """The tests whose outcome is not the same: (without, with), each with its reason."""
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


def count_file(without: Outcomes, with_plugin: Outcomes, end: str) -> dict[str, Any]:
    """A file's counts: passes with and without, and why the rest does not apply.

    Args:
        without: its outcomes without the plugin.
        with_plugin: and with it.
        end: how its process without the plugin ended.
    """
    rest = {t: why for t, (outcome, why) in without.items() if outcome != "passed"}
    counts: dict[str, Any] = {
        "passed_without": len(without) - len(rest),
        "passed_with": sum(o == "passed" for o, _ in with_plugin.values()),
        "do_not_apply": dict(Counter(map(why_not, rest.values())).most_common()),
    }
    if end != "ended":
        counts["end"] = f"{end}: its further tests are not counted"
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
        "files_stopped": sum("end" in c for c in files.values()),
    }


class Passes:
    """Runs vLLM's tests in a copy of their folder, with a small stand-in of the hub."""

    def __init__(self, folder: Path, work: Path, args: argparse.Namespace) -> None:
        self.root, self.args, self.hub = work / "root", args, work / "hub"
        shutil.copytree(folder, self.root / "tests")
        write_stand_in(self.hub)

    def run(self, arm: str, files: list[str]) -> tuple[dict[str, Outcomes], dict, set]:
        """One pass: the files' outcomes, how they ended, what said the plugin is in."""
        out = Path(tempfile.mkdtemp(prefix=f"{arm}-", dir=self.root.parent))
        limits = {"file_limit": self.args.limit, "test_limit": self.args.test_limit}
        job = out / "job.json"
        job.write_text(json.dumps({"files": files, "out": str(out), **limits}))
        worker = Path(__file__).with_name("_own_tests_pass.py")
        subprocess.run(
            [sys.executable, str(worker), str(job)],
            cwd=self.root,
            env=self.environment(arm),
            check=True,
        )
        read = {f: read_outcomes(out / f"{i}.jsonl") for i, f in enumerate(files)}
        ends = json.loads((out / "ends.json").read_text())
        plugin = {state for _, state in read.values()} - {NOT_RUN}
        return {file: outcomes for file, (outcomes, _) in read.items()}, ends, plugin

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
    (model / "refs").mkdir(parents=True)
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


def run_both(passes: Passes, files: list[str]) -> dict[str, Any]:
    """Both passes, the second look at what differs, and the counts."""
    without, ends, out = passes.run("without", files)
    with_plugin, ends_with, loaded = passes.run("with", files)
    if out != {"not loaded"} or loaded != {"loaded"}:
        raise RuntimeError(f"the plugin was {out} without and {loaded} with it")
    first = {file: compare(without[file], with_plugin[file]) for file in files}
    again = [file for file in files if first[file]]
    second: dict[str, Any] = {}
    if again:
        one, two = (passes.run(arm, again)[0] for arm in ARMS)
        second = {t: d for file in again for t, d in compare(one[file], two[file]).items()}
    found = {test: pair for pairs in first.values() for test, pair in pairs.items()}
    counted = {
        file: count_file(without[file], with_plugin[file], ends[file]) for file in files
    }
    return {
        "totals": totals(counted),
        "differences": {t: pair for t, pair in found.items() if t in second},
        "unsteady": {t: pair for t, pair in found.items() if t not in second},
        "ends_that_differ": {f: [ends[f], ends_with[f]] for f in files if ends[f] != ends_with[f]},
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
    return parser.parse_args()


def main() -> int:
    """Runs, prints the totals, writes the file; 1 if a test's outcome differs."""
    args = arguments()
    files = selected_files(args.vllm_tests, args.files)
    with tempfile.TemporaryDirectory(prefix="vllm-own-tests-") as work:
        result = run_both(Passes(args.vllm_tests, Path(work), args), files)
    print(json.dumps({k: v for k, v in result.items() if k != "files"}, indent=1))
    common.write_json(args.json, result)
    return int(bool(result["differences"]))


if __name__ == "__main__":
    sys.exit(main())

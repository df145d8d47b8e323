"""The README's file map and commands exist, and no file is left out of the map."""

import re
from pathlib import Path

import pytest

from vllm_dspark.cli import SUBCOMMANDS, build_parser

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def file_map() -> set[str]:
    """Paths below vllm_dspark/ that the map names, from its indentation."""
    block = README.split("```\nvllm_dspark/\n")[1].split("```")[0]
    found, folder, inner = set(), "", ""
    for line in block.splitlines():
        if not line.startswith("  "):
            break
        if match := re.match(r"  (\w+/) ", line):
            folder, inner = match[1], ""
        elif re.match(r"  \w", line):
            folder = inner = ""
        elif match := re.match(r"    (\w+/) ", line):
            inner = match[1]
        elif re.match(r"    \w", line):
            inner = ""
        found |= {
            folder + inner + name
            for name in re.findall(r"(?<=\s)\w+\.py(?=\s)", line[:32])
        }
    return found


def test_the_map_names_every_module_and_no_other():
    package = ROOT / "vllm_dspark"
    files = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert file_map() == files


def test_make_targets_exist():
    rules = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"`make ([a-z-]+)`", README)) <= set(rules)


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_subcommand_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args([name, "--help"])
    assert stop.value.code == 0
    assert f"example:\n  vllm-dspark {name}" in capsys.readouterr().out


RESULTS = ROOT / "benchmarks" / "results"
# Files that README names and that are no results of ours: users' own.
USERS = {"config.json", "dspark_calibration.json", "manifest.json", "result.json"}


def named_results(text: str) -> set[str]:
    """Names in backticks that look like results: a file, or a folder below results/."""
    files = set(re.findall(r"`([\w-]+\.(?:json|png))`", text))
    return files | set(re.findall(r"`(?:results/)?([\w-]+)/`", text))


def test_measurements_name_every_result_and_no_other():
    named = named_results((ROOT / "docs" / "measured.md").read_text())
    there = {p.name for p in RESULTS.iterdir() if p.suffix != ".png"}
    assert {name for name in named if not (RESULTS / name).exists()} == set()
    assert there - named == set()


def test_readme_takes_its_figures_from_results():
    named = {n for n in named_results(README) if n.endswith(".json")} - USERS
    assert len(named) >= 10
    assert {name for name in named if not (RESULTS / name).exists()} == set()

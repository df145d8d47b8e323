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

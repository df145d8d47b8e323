"""Which module may import what: the layers of the README's file map, enforced.

Imports are read from the syntax tree, those inside functions included (a lazy import
is still a dependency); ``if TYPE_CHECKING`` blocks are not, they never run.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "vllm_dspark"
BASE = {"config", "config_reader", "types"}
# Parts of the package that a part may import, besides itself.
MAY_IMPORT = {
    "__init__": set(),
    "types": set(),
    "config_reader": set(),
    "config": {"config_reader"},
    "_build_info": set(),
    "provenance": {"_build_info"},
    "cache": set(),
    "ops": BASE | {"_build_info"},
    "model": BASE | {"ops"},
    "proposer": BASE | {"model", "ops"},
    "verifier": BASE | {"model", "ops"},
    "decode": BASE | {"model", "ops", "proposer", "verifier"},
    "train": BASE | {"calibration", "decode", "model", "ops", "provenance"},
    "calibration": BASE,
    "schedule": BASE | {"calibration"},
    "metrics": BASE | {"calibration", "schedule"},
    # plugin and integration are vLLM's side: they see everything. The command line
    # starts from there only to say what vLLM offers, and imports no vLLM itself.
    "cli": {"*"},
    "plugin": {"integration"},
    "integration": {"*"},
}
# Beside the standard library: no torch in the scheduler.
NUMPY_ONLY = {"metrics", "schedule"}
STANDARD_LIBRARY_ONLY = BASE | {"__init__", "_build_info", "cache", "provenance"}


def imported_modules(source: str) -> Iterator[str]:
    """Dotted names a source imports, type-checking blocks left out."""
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in this project"
            # `from vllm_dspark import _C` imports a module, not a name of one.
            package = node.module == "vllm_dspark"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from names if package else [node.module or ""]
        todo += ast.iter_child_nodes(node)


def violations(part: str, file: str, source: str) -> list[str]:
    """What a file of a part imports against the rules."""
    allowed, found = MAY_IMPORT[part] | {part}, []
    for name in imported_modules(source):
        top, *rest = name.split(".")
        if top == "vllm_dspark":
            inner = rest[0] if rest else "__init__"
            native = inner == "_C"
            if native and not file.endswith("_native.py"):
                found.append(f"{file}: {name} (only in *_native.py)")
            elif not native and "*" not in allowed and inner not in allowed:
                found.append(f"{file}: {name} (not below {part})")
        elif top == "vllm" and part != "integration":
            found.append(f"{file}: {name} (only in integration/)")
        elif top == "triton" and not file.endswith("_triton.py"):
            found.append(f"{file}: {name} (only in *_triton.py)")
        elif part in STANDARD_LIBRARY_ONLY and top not in sys.stdlib_module_names:
            found.append(f"{file}: {name} (standard library only)")
        elif part in NUMPY_ONLY and top not in {"numpy", *sys.stdlib_module_names}:
            found.append(f"{file}: {name} (numpy only)")
    return found


def test_every_module_keeps_to_its_layer() -> None:
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        part = path.relative_to(ROOT).parts[0].removesuffix(".py")
        found += violations(part, path.name, path.read_text())
    assert found == []


@pytest.mark.parametrize(
    ("part", "file", "source"),
    [
        ("model", "drafter.py", "def f():\n    from vllm.config import VllmConfig"),
        ("model", "drafter.py", "from vllm_dspark.decode import generate"),
        ("ops", "rejection.py", "from vllm_dspark import _C"),
        ("ops", "rejection.py", "import triton.language as tl"),
        ("types", "types.py", "import torch"),
        ("schedule", "planner.py", "import torch"),
        ("cli", "check.py", "import vllm"),
    ],
)
def test_violations_are_seen(part: str, file: str, source: str) -> None:
    assert len(violations(part, file, source)) == 1


def test_type_checking_imports_do_not_count() -> None:
    source = "if TYPE_CHECKING:\n    from torch import Tensor"
    assert violations("types", "types.py", source) == []

"""Hold both compat tables against unpacked vLLM sources, without importing them.

    python scripts/check_vllm_sources.py path/to/site-packages   # contains vllm/

For a vLLM that cannot be installed here (another platform's wheel, unpacked). It
knows classes, functions, module-level names and inherited methods; it does not run
anything, so what is made at run time cannot be seen.
"""

from __future__ import annotations

import argparse
import ast
import sys
from functools import cache
from pathlib import Path

from vllm_dspark.integration.symbols import SYMBOLS, Symbol, symbol_of
from vllm_dspark.integration.v2.symbols import SYMBOLS_V2

Def = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef | ast.stmt


class Sources:
    """Names defined in a tree of Python files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cache  # noqa: B019 - one short-lived instance
    def module(self, name: str) -> ast.Module | None:
        base = self.root.joinpath(*name.split("."))
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return ast.parse(path.read_text())
        return None

    def find(self, module: str, name: str) -> tuple[str, Def] | None:
        """(module that defines it, its node) of a top-level name, through imports."""
        tree = self.module(module)
        if tree is None:
            return None
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return module, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and name in _targets(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.find(_absolute(module, node, self), alias.name)
        return None

    def member(self, module: str, cls: ast.ClassDef, name: str) -> Def | None:
        """A method or attribute of a class or of the bases that can be found."""
        for node in cls.body:
            if getattr(node, "name", None) == name:
                return node
        for base in cls.bases:
            found = self.find(module, base.id) if isinstance(base, ast.Name) else None
            if found and isinstance(found[1], ast.ClassDef):
                inherited = self.member(found[0], found[1], name)
                if inherited is not None:
                    return inherited
        return None


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [t.id for t in targets if isinstance(t, ast.Name)]


def _absolute(module: str, node: ast.ImportFrom, sources: Sources) -> str:
    if not node.level:
        return node.module or ""
    package = sources.root.joinpath(*module.split(".")).is_dir()
    parts = module.split(".")
    keep = len(parts) - node.level + (1 if package else 0)
    return ".".join([*parts[:keep], *([node.module] if node.module else [])])


def _parameters(node: Def) -> list[str]:
    if isinstance(node, ast.ClassDef):
        init = next(
            (n for n in node.body if getattr(n, "name", "") == "__init__"), None
        )
        if init is None:  # a dataclass or a named tuple: its fields
            return [
                n.target.id
                for n in node.body
                if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            ]
        node = init
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return []
    args = node.args
    return [a.arg for a in (*args.posonlyargs, *args.args, *args.kwonlyargs)]


def check(sources: Sources, symbol: Symbol) -> str:
    """Empty when the symbol is there and takes what we pass, else what is wrong."""
    module, _, name = symbol.path.partition(":")
    if sources.module(module) is None:
        return "no such module"
    if not name:
        return ""
    first, *rest = name.split(".")
    found = sources.find(module, first)
    if found is None:
        return f"{first} is not defined"
    where, node = found
    for part in rest:
        if not isinstance(node, ast.ClassDef):
            return f"{first} is not a class"
        member = sources.member(where, node, part)
        if member is None:
            return f"no {part}"
        node = member
    if symbol.params is None:
        return ""
    order = [p for p in _parameters(node) if p in symbol.params]
    if order != list(symbol.params):
        return f"parameters {_parameters(node)}, expected {list(symbol.params)}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder that contains vllm/")
    sources = Sources(parser.parse_args().root)
    v2 = [symbol_of(*row) for row in SYMBOLS_V2]
    problems = [(s.path, check(sources, s)) for s in (*SYMBOLS, *v2)]
    for path, problem in problems:
        if problem:
            print(f"{path}: {problem}")
    bad = sum(bool(p) for _, p in problems)
    print(f"{len(problems) - bad} of {len(problems)} symbols found as expected")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

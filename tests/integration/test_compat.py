"""The table of vLLM's symbols, and what happens where it does not hold.

* every symbol is there in the vLLM that is installed;
* another version, and a missing or changed symbol, are refused by name, before an
  engine starts;
* everything the package imports from vLLM stands in the table: an import that does not
  would break with the next vLLM without a word of explanation.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import vllm_dspark
from tests.integration.subprocesses import run_python

PACKAGE = Path(vllm_dspark.__file__).parent / "integration"


@pytest.fixture
def compat() -> Iterator[Any]:
    from vllm_dspark.integration import compat

    compat.symbol_report.cache_clear()
    yield compat
    compat.symbol_report.cache_clear()


def test_every_symbol_is_there(compat: Any) -> None:
    assert [row for row in compat.symbol_report() if not row.ok] == []
    compat.require()


def test_every_symbol_of_the_v2_adapter_is_there(compat: Any) -> None:
    assert [row for row in compat.symbol_report_v2() if not row.ok] == []
    assert compat.v2_trouble() is None


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "1.0.0+cpu", "nightly"])
def test_another_version_is_refused(
    compat: Any, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(compat, "vllm_version", lambda: ("vllm", version))
    with pytest.raises(ValueError, match=r"needs vLLM 0\.32 and 0\.33") as error:
        compat.require()
    assert version in str(error.value)


@pytest.mark.parametrize(
    ("path", "params"),
    [
        ("vllm.v1.sample.sampler:Sampler.conjure", None),
        ("vllm.v1.nowhere:Thing", None),
        ("vllm.v1.sample.sampler:Sampler.compute_logprobs", ("logits", "magic")),
    ],
)
def test_a_missing_symbol_is_named(
    compat: Any,
    monkeypatch: pytest.MonkeyPatch,
    tiny_target: Path,
    tiny_drafter: Path,
    path: str,
    params: tuple[str, ...] | None,
) -> None:
    """Also to the user, before an engine starts."""
    from vllm.engine.arg_utils import EngineArgs

    missing = compat.Symbol(path, params, "tested")
    monkeypatch.setattr(compat, "SYMBOLS", (*compat.SYMBOLS, missing))
    with pytest.raises(ValueError) as error:
        EngineArgs(
            model=str(tiny_target),
            skip_tokenizer_init=True,
            speculative_config={"method": "dspark", "model": str(tiny_drafter)},
        ).create_engine_config()
    assert path in str(error.value)
    assert all(p in str(error.value) for p in params or ())


_ELSEWHERE = """
import importlib, json, pkgutil, sys
import vllm_dspark.integration as package
from vllm_dspark.integration import compat

compat._on_cpu = lambda: False
rows = [*compat.symbol_report(), *compat.symbol_report_v2()]
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith(".cpu_worker"):
        importlib.import_module(module.name)
print(json.dumps({
    "bad": [row.symbol for row in rows if not row.ok],
    "skipped": [row.symbol for row in rows if row.found == "not looked for"],
    "cpu": [name for name in sys.modules if name.startswith("vllm.v1.worker.cpu")],
}))
"""


def test_nothing_of_the_cpu_worker_is_imported_where_there_is_none() -> None:
    """Importing it puts host memory in the place of a GPU's buffers (V2 runner)."""
    result = run_python(_ELSEWHERE, start="fresh")
    assert result["bad"] == [] == result["cpu"]
    assert "vllm.v1.worker.cpu_worker:CPUWorker.init_device" in result["skipped"]


def vllm_imports(source: str) -> Iterator[tuple[str, str]]:
    """(module, name) of what a source imports from vLLM; name "" for the module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield alias.name, ""
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.split(".")[0] == "vllm":
                yield from ((module, alias.name) for alias in node.names)


def resolve(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        try:
            found = getattr(found, part)
        except AttributeError:
            found = importlib.import_module(f"{module}.{part}")
    return found


def is_listed(module: str, name: str, paths: list[str]) -> bool:
    """Under its own path, or (not so for plain values) under another one of it."""
    path = f"{module}:{name}" if name else module
    found = resolve(module, name)
    if isinstance(found, ModuleType):
        # What is used of a module is listed with its module's name.
        return any(p.partition(":")[0] == found.__name__ for p in paths)
    if any(p == path or p.startswith(path + ".") for p in paths):
        return True
    parts = [p.partition(":") for p in paths]
    owners = {(m, n.split(".")[0]) for m, _, n in parts if n}
    return callable(found) and any(found is resolve(m, n) for m, n in owners)


def test_every_import_stands_in_the_table(compat: Any) -> None:
    paths = [symbol.path for symbol in compat.SYMBOLS]
    paths += [path for path, _, _ in compat.SYMBOLS_V2]
    imports = [
        (file.name, module, name)
        for file in sorted(PACKAGE.rglob("*.py"))
        for module, name in vllm_imports(file.read_text())
    ]
    assert len(imports) > 30
    missing = [entry for entry in imports if not is_listed(*entry[1:], paths)]
    assert missing == []
    assert not is_listed("vllm.sampling_params", "BeamSearchParams", paths)

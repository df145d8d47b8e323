"""How the extension is found: shared threads, forced instruction sets, stale builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_dspark._build_info import source_hash
from vllm_dspark.ops import extension_native, native_status, rejection_sample

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = (
    "import logging, torch; logging.basicConfig(level=logging.INFO);"
    "from vllm_dspark.ops import native_status, rejection_sample;"
    "z = torch.zeros(0, dtype=torch.int64);"
    "run = lambda b='auto': rejection_sample("
    "torch.zeros(1, 9), z, torch.tensor([0]), backend=b).backend;"
)


def run_python(
    code: str, cwd: Path = ROOT, **env: str
) -> subprocess.CompletedProcess[str]:
    # An engine that ran in this process has preloaded its OpenMP for its children.
    inherited = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={**inherited, **env},
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_openmp() -> set[str]:
    """Files of OpenMP runtimes mapped into this process."""
    maps = Path("/proc/self/maps").read_text()
    return set(re.findall(r"/\S*lib(?:gomp|iomp|omp)\S*\.so\S*", maps))


def test_threads_are_those_of_torch(native: None) -> None:
    module = extension_native.require()
    path, origin = module.omp_runtime()
    assert origin in {"process", "torch"}
    # torch's runtime is in torch/lib, or one that was preloaded over it.
    assert path in loaded_openmp()
    assert Path(path).parent == Path(torch.__file__).parent / "lib" or os.environ.get(
        "LD_PRELOAD"
    )
    # In a process of its own: vLLM's CPU worker makes set_num_threads do nothing.
    code = (
        "import torch; from vllm_dspark.ops import extension_native, native_status\n"
        "for n in (2, 1):\n"
        "    torch.set_num_threads(n)\n"
        "    module = extension_native.require()\n"
        "    assert module.max_threads() == native_status().threads == n\n"
        "print('ok')"
    )
    done = run_python(code)
    assert done.stdout.strip() == "ok", done.stderr


def test_no_runtime_is_linked(native: None) -> None:
    """Loading the extension alone, before torch, brings in no OpenMP of its own."""
    path = extension_native.require().__file__
    code = (
        "import importlib.util as u, pathlib;"
        f"s = u.spec_from_file_location('vllm_dspark._C', {path!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m);"
        "assert 'gomp' not in pathlib.Path('/proc/self/maps').read_text();"
        "assert m.max_threads() == 1; print(m.omp_runtime())"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "none" in done.stdout


def test_status(native: None) -> None:
    status = native_status()
    assert status.available and status.isa in {
        "amx",
        "avx512_bf16",
        "avx512",
        "avx2",
        "scalar",
    }
    assert "threads of" in status.reason


def test_forced_instruction_set(native: None) -> None:
    code = SAMPLE + "run(); print(native_status().isa)"
    done = run_python(code, VLLM_DSPARK_ISA="scalar")
    assert done.stdout.strip() == "scalar", done.stderr
    assert done.stderr.count("native kernels: scalar") == 1
    done = run_python(code, VLLM_DSPARK_ISA="sse9")
    assert "unknown 'sse9' (scalar, avx2, avx512, avx512_bf16, amx)" in done.stderr


def test_without_extension() -> None:
    """A package with no build: logs once, runs the reference, refuses native."""
    missing = "import sys; sys.modules['vllm_dspark._C'] = None;"
    done = run_python(missing + SAMPLE + "print(run(), run()); run('native')")
    assert done.stdout.strip() == "reference reference"
    assert done.stderr.count("kernels run on the torch reference") == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: backend 'native' is unavailable")
    assert "python setup.py build_ext --inplace" in error


def test_stale_build_is_an_error(native: None, tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "vllm_dspark", tmp_path / "vllm_dspark", ignore=skip)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    assert run_python(SAMPLE + "print(run())", tmp_path).stdout.strip() == "native"
    with (tmp_path / "csrc" / "rejection.cpp").open("a") as file:
        file.write("// changed\n")
    done = run_python(SAMPLE + "run()", tmp_path)
    assert "built from other sources" in done.stderr
    assert "python setup.py build_ext --inplace" in done.stderr


def test_hash_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.cpp").write_text("x")
    first = source_hash(tmp_path)
    (tmp_path / "notes.txt").write_text("not a source")
    assert source_hash(tmp_path) == first
    (tmp_path / "a.cpp").rename(tmp_path / "b.cpp")
    assert source_hash(tmp_path) != first


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_result_names_its_backend(native: None, backend: str) -> None:
    logits, ids = torch.zeros(1, 4), torch.zeros(0, dtype=torch.int64)
    result = rejection_sample(logits, ids, torch.tensor([0]), backend=backend)
    assert result.backend == backend
    assert rejection_sample(logits, ids, torch.tensor([0])).backend == "native"


@pytest.mark.slow
def test_install_without_a_compiler(tmp_path: Path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / "vllm_dspark").mkdir()
    shutil.copy(ROOT / "vllm_dspark" / "_build_info.py", tmp_path / "vllm_dspark")
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    for extra, said in (
        ({"CC": "no-such-compiler", "CXX": "no-such-compiler"}, "were not built"),
        ({"VLLM_DSPARK_NO_EXT": "1"}, "VLLM_DSPARK_NO_EXT is set"),
    ):
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, **extra},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
        assert not list(tmp_path.rglob("*.so"))

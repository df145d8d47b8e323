"""Triton kernels compiled ahead of time, and what their binaries use.

Registers, shared memory and spills of an NVIDIA target are what the assembler that
Triton runs (`ptxas -v`, shipped in its wheel) says of the kernel's PTX with the flags
that Triton gives it; of an AMD target, the metadata in the assembly. No GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LAUNCH_OPTIONS = ("num_warps", "enable_fp_fusion")
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}


@dataclass(frozen=True)
class Launch:
    """One recorded launch: a kernel, its grid, arguments and constants."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)


@dataclass(frozen=True)
class Usage:
    """What one binary uses.

    Attributes:
        registers: of a thread; vector registers on AMD.
        shared_bytes: of a program.
        spills: bytes stored and loaded (NVIDIA) or vector registers spilled (AMD).
        scalar_spills: AMD's scalar registers kept in lanes of vector registers.
        local_bytes: local memory of a thread that spills or arrays take.
    """

    registers: int
    shared_bytes: int
    spills: int
    scalar_spills: int
    local_bytes: int


class Recorder:
    """Stands in for `launch_triton.launch` and keeps what would have been launched."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any
    ) -> None:
        self.launches.append(Launch(kernel, grid, args, constants))


def compile_launch(launch: Launch, target: str) -> Usage:
    """Compiles for a target as the just-in-time compiler would for these arguments."""
    options = {k: v for k, v in launch.constants.items() if k in LAUNCH_OPTIONS}
    constants = {k: v for k, v in launch.constants.items() if k not in options}
    signature: dict[str, str] = {}
    divisible = {}
    names = launch.kernel.arg_names
    for i, (name, value) in enumerate(zip(names, launch.args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            specialised = name not in (launch.kernel.do_not_specialize or ())
            if specialised and value % 16 == 0:
                divisible[(i,)] = [["tt.divisibility", 16]]
    signature.update(dict.fromkeys(constants, "constexpr"))
    source = ASTSource(launch.kernel, signature, constexprs=constants, attrs=divisible)
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if "amdgcn" in binary.asm:
        return _amd(binary.asm["amdgcn"], binary.metadata.shared)
    fusion = bool(options.get("enable_fp_fusion", True))
    return _nvidia(
        binary.asm["ptx"], TARGETS[target].arch, fusion, binary.metadata.shared
    )


def _nvidia(ptx: str, arch: int, fusion: bool, shared: int) -> Usage:
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2"]
        command += [] if fusion else ["--fmad=false"]
        command += [f"--gpu-name={found[1]}", str(file), "-o", f"{file}.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    stack = re.search(r"(\d+) bytes stack frame", done.stderr)
    spills = re.findall(r"(\d+) bytes spill", done.stderr)  # stores and loads
    assert registers and stack and len(spills) == 2, done.stderr
    return Usage(int(registers[1]), shared, sum(map(int, spills)), 0, int(stack[1]))


def _amd(assembly: str, shared: int) -> Usage:
    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    return Usage(
        field("vgpr_count"),
        shared,
        field("vgpr_spill_count"),
        field("sgpr_spill_count"),
        field("private_segment_fixed_size"),
    )

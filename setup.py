"""Builds the optional extension `vllm_dspark._C`; all metadata is in pyproject.toml.

The kernels need a C++17 compiler and nothing else: no torch, no OpenMP flags (the
threads of the runtime that torch brings are found at run time). Without a compiler the
package installs all the same and runs on its torch reference.
VLLM_DSPARK_NO_EXT=1 leaves the extension out on purpose.
"""

import os
import platform
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

CSRC = Path(__file__).resolve().parent / "csrc"
INFO = runpy.run_path(str(CSRC.parent / "vllm_dspark" / "_build_info.py"))

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    # GCC 12's own intrinsics headers trip over these two.
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
    "-g0",
    # The backends agree only if a product and a sum stay two roundings.
    "-ffp-contract=off",
]
AVX2 = ["-mavx2", "-mfma"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# Files that may use more than the baseline; which of them runs is decided at run time.
ISA_FLAGS = {
    "kernels_avx2": AVX2,
    "kernels_avx512": AVX512,
    "kernels_avx512_bf16": [*AVX512, "-mavx512bf16"],
    "kernels_amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
NO_BUILD = """
vllm-dspark: the C++ kernels were not built ({reason}).
The package is installed and works on its torch reference, which is slower. To get the
native backend install a C++17 compiler (for example `apt install g++`) and run
`{command}` in a checkout, or install the package again.
"""


class OptionalBuild(build_ext):
    """Compiles each file with its own flags; a failure is reported, not fatal."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            message = NO_BUILD.format(reason=reason, command=INFO["REBUILD_COMMAND"])
            print(message, file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """In place: an extension that was not built is not copied."""
        built = Path(self.build_lib)
        self.extensions = [
            ext
            for ext in self.extensions
            if (built / self.get_ext_filename(ext.name)).exists()
        ]
        super().copy_extensions_to_source()

    def _build(self, ext: Extension) -> None:
        x86 = platform.machine().lower() in {"x86_64", "amd64"}
        build_dir = Path(self.build_temp)

        def compile_with(source: str, isa: list[str]) -> str:
            (built,) = self.compiler.compile(
                [source],
                output_dir=str(build_dir),
                macros=ext.define_macros,
                include_dirs=[str(CSRC)],
                extra_postargs=[*COMMON_FLAGS, *isa],
            )
            return str(built)

        def compile_one(source: str) -> str:
            isa = ISA_FLAGS.get(Path(source).stem, []) if x86 else []
            try:
                return compile_with(source, isa)
            except CompileError:
                if not isa:
                    raise
                # A compiler that does not know the flags: the file compiles without
                # them to "this build has no such kernels".
                return compile_with(source, [])

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["dl"],
            target_lang="c++",
        )


def extensions() -> list[Extension]:
    """The extension, or nothing when the user asked for none."""
    if os.environ.get("VLLM_DSPARK_NO_EXT", "0") not in {"", "0"}:
        print("vllm-dspark: VLLM_DSPARK_NO_EXT is set, no C++ kernels", file=sys.stderr)
        return []
    return [
        Extension(
            "vllm_dspark._C",
            sources=[f"csrc/{p.name}" for p in sorted(CSRC.glob("*.cpp"))],
            language="c++",
            define_macros=[("DSPARK_SOURCE_HASH", f'"{INFO["source_hash"](CSRC)}"')],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})

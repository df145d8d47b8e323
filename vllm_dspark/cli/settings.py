"""How the demo starts `vllm serve`: the same for every arm.

What the user has set in the environment stays as it is.
"""

import os
import sys
from pathlib import Path

# Short contexts and few requests: less memory and start time.
SERVER_ARGUMENTS = ["--max-model-len", "2048", "--max-num-seqs", "8"]
# An answer asked twice must not skip its prefill the second time.
MEASURING_ARGUMENTS = ["--no-enable-prefix-caching"]

# Up to this many cores, keeping one for the server's own processes costs more than it
# brings (two cores, one stream: 22 tokens/s with one thread, 30 with two).
_FEW_CORES = 4


def server_environment() -> dict[str, str]:
    """Environment variables for the server, besides the user's own."""
    wanted = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "HF_HUB_OFFLINE": "1",  # everything is on disk
        "VLLM_NO_USAGE_STATS": "1",
        # vLLM 0.32 saves ahead-of-time compilations on CPU but cannot load them
        # ("no attribute 'finalize_loading'") and compiles again at every start; torch's
        # own cache works: 39 s to start the second time instead of 110.
        "VLLM_USE_AOT_COMPILE": "0",
    }
    if len(os.sched_getaffinity(0)) <= _FEW_CORES:
        wanted["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if openmp := intel_openmp():
        wanted["LD_PRELOAD"] = str(openmp)
    return {name: value for name, value in wanted.items() if name not in os.environ}


def intel_openmp() -> Path | None:
    """Intel's OpenMP library, which `vllm-cpu` installs and vLLM asks to preload.

    Speculation gains from it (many short parallel regions), and two threads on two
    busy cores do not wait for each other as they do with GNU's.
    """
    library = Path(sys.prefix) / "lib" / "libiomp5.so"
    return library if library.is_file() else None


SERVER_ENVIRONMENT = server_environment()

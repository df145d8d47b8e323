"""DSpark speculative decoding for vLLM where vLLM has none: on its V1 runner.

Importing this package costs nothing: vLLM loads it in every one of its processes,
so neither torch nor vLLM is imported here.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    # Reading the installed metadata takes milliseconds, which a plugin that is
    # loaded in every process should not spend unless asked.
    if name == "__version__":
        from importlib.metadata import version

        return version("vllm-dspark")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

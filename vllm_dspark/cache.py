"""Where things are kept between runs."""

import os
from pathlib import Path


def cache_root() -> Path:
    """The user's cache: $VLLM_DSPARK_CACHE, $XDG_CACHE_HOME or ~/.cache."""
    if own := os.environ.get("VLLM_DSPARK_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "vllm-dspark"

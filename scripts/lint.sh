#!/usr/bin/env bash
# Lint and type checks:  bash scripts/lint.sh [--fix]
set -uo pipefail
cd "$(dirname "$0")/.."
bin=${VENV:-.venv}/bin
failed=()
run() { echo "== $1"; shift; "$@" || failed+=("$*"); }
sources=$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.hpp')

if [ "${1:-}" = --fix ]; then
  run 'ruff fix' "$bin/ruff" check --fix .
  run 'ruff format' "$bin/ruff" format .
  [ -z "$sources" ] || run 'clang-format' "$bin/clang-format" -i $sources
fi
run 'ruff' "$bin/ruff" check .
run 'ruff format' "$bin/ruff" format --check .
run 'mypy' "$bin/mypy"
[ -z "$sources" ] || run 'clang-format' "$bin/clang-format" --dry-run --Werror $sources
if [ ${#failed[@]} -gt 0 ]; then
  printf 'lint failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
echo 'lint: all clean'

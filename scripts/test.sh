#!/usr/bin/env bash
# Run the tests:  bash scripts/test.sh [--slow] [pytest options]
# Fast ones only unless --slow; tests that need a GPU never run here.
set -euo pipefail
cd "$(dirname "$0")/.."
marks='not slow and not gpu'
if [ "${1:-}" = --slow ]; then marks='not gpu'; shift; fi
exec "${VENV:-.venv}/bin/python" -m pytest -m "$marks" "$@"

#!/usr/bin/env bash
# Run the tests:  bash scripts/test.sh [--slow] [pytest options]
# Fast ones only unless --slow; tests that need a GPU never run here.
# Two processes share the test files out, those that take longest first
# (tests/conftest.py), and those that are to run alone (all slow) come after;
# -n0 runs all in one, which --pdb and -s ask for.
set -euo pipefail
cd "$(dirname "$0")/.."
marks='not slow and not gpu' slow=''
if [ "${1:-}" = --slow ]; then marks='not gpu' slow=1; shift; fi
# Tiny models gain nothing from a second thread, and two teams on two cores only wait.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
python=("${VENV:-.venv}/bin/python" -m pytest)
two=(-n 2 --dist loadfile --no-loadscope-reorder)
if [[ " $* " == *" -n0 "* ]]; then exec "${python[@]}" -m "$marks" "$@"; fi
if [ -z "$slow" ]; then exec "${python[@]}" -m "$marks" "${two[@]}" "$@"; fi
code=0
"${python[@]}" -m "$marks and not alone" "${two[@]}" "$@" || code=$?
case $code in 0 | 1 | 5) # 5: there was none
  alone=0
  "${python[@]}" -m "$marks and alone" "$@" || alone=$?
  if [ "$code" -eq 5 ]; then code=$alone; fi
  case $alone in 0 | 5) ;; *) code=$alone ;; esac ;;
esac
exit "$code"

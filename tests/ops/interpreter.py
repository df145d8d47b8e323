"""Runs a script in a process of its own, with Triton's interpreter on or off.

Interpretation must be asked for before triton is imported, and once it is, a process
can compile no more.
"""

from __future__ import annotations

import os
import subprocess
import sys

# The interpreter patches triton.language anew for every call of one device function
# from another, which is most of its time. The outermost patch is enough.
QUICK = """
import triton.runtime.interpreter as interpreter
import types, triton.language
everything = types.SimpleNamespace(
    __globals__={"tl": triton.language, "core": triton.language.core}
)
patch, active = interpreter._patch_lang, []
def patch_once(fn):
    if active:
        return interpreter._LangPatchScope()
    scope = patch(everything)
    active.append(scope)
    restore = scope.restore
    def restore_all():
        active.clear()
        restore()
    scope.restore = restore_all
    return scope
interpreter._patch_lang = patch_once
import torch
torch.set_num_threads(1)
"""


def run_script(script: str, *, interpret: bool) -> str:
    """What the script prints; fails with its errors if it does not end well."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", (QUICK if interpret else "") + script],
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout

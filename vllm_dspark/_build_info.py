"""What ties a build of the extension to the sources it was made from.

`setup.py` runs this file without importing the package, so: standard library only.
"""

import hashlib
from pathlib import Path

REBUILD_COMMAND = "python setup.py build_ext --inplace"


def source_hash(csrc: Path) -> str:
    """SHA-256 over the names and contents of all C++ sources in `csrc`."""
    digest = hashlib.sha256()
    for path in sorted(csrc.iterdir()):
        if path.suffix in {".cpp", ".h"}:
            content = path.read_bytes()
            digest.update(f"{path.name} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()

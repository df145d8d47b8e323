"""`vllm-dspark profile`: what steps cost on this machine.

Shows the cost table of a target and a drafter. If the cache has none that fits, a
server is started, which measures one, and stopped again. What it measured is kept:
servers with the same settings start with it.
"""

import argparse
import signal
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dspark.cache import cache_root
from vllm_dspark.cli.display import wait_for
from vllm_dspark.cli.profile_show import show
from vllm_dspark.cli.rounds.arguments import check_folder_of
from vllm_dspark.cli.server import Server, speculative_arguments
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT
from vllm_dspark.cli.signals import interrupt
from vllm_dspark.schedule import cost_file
from vllm_dspark.schedule.cost_file import FOLDER

_EXAMPLE = """example:
  vllm-dspark profile --target TARGET --drafter DRAFTER --plot cost.png
  vllm-dspark profile --target TARGET --drafter DRAFTER --compiled --fresh
  vllm-dspark profile ~/.cache/vllm-dspark/cost/0123456789abcdef.json --json cost.json

`vllm-dspark demo --paths` prints the folders of the demo's target and drafter.
Measuring takes about ten seconds on top of a server's start; nothing else should run
meanwhile. Compiled and eager servers have tables of their own.
"""
_MAX_NUM_SEQS = 8
_MAX_MODEL_LEN = 2048  # tokens


def add_parser(subparsers: Any) -> None:
    """Add the ``profile`` subcommand."""
    parser = subparsers.add_parser(
        "profile",
        help="what steps cost on this machine: measure, show, draw",
        description="Measure and show the cost table of a target and a drafter.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("file", type=Path, nargs="?", help="show this cost table; starts no server")
    add("--target", metavar="MODEL", help="a folder, or a name in the local HF cache")
    add("--drafter", type=Path, metavar="FOLDER")
    add("--compiled", action="store_true",
        help="of a server without --enforce-eager (starts slower)")  # fmt: skip
    add("--max-num-seqs", type=int, metavar="N", default=_MAX_NUM_SEQS,
        help="requests at a time, as far as it reaches (%(default)s)")  # fmt: skip
    add("--fresh", action="store_true", help="measure even if the cache has a table")
    add("--port", type=int, help="of the server (any free one)")
    add("--plot", type=Path, metavar="PNG", help="draw it into a file")
    add("--json", type=Path, metavar="FILE", help="write it for machines")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    signal.signal(signal.SIGTERM, interrupt)
    _check(arguments)
    console = Console()
    path = arguments.file
    if path is None and not arguments.fresh:
        path = find(arguments)
        if path is not None:
            console.print("measured before; --fresh measures anew")
    if path is None:
        path = measure(arguments, console)
    show(path, console, arguments.plot, arguments.json)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    pair = arguments.target is not None, arguments.drafter is not None
    if arguments.file is not None and any(pair):
        raise ValueError("give a FILE to show, or --target and --drafter, not both")
    if arguments.file is None and not all(pair):
        raise ValueError("give --target and --drafter, or a FILE to show")
    if arguments.max_num_seqs < 1:
        raise ValueError(f"--max-num-seqs is {arguments.max_num_seqs}; at least 1")
    check_folder_of("--plot", arguments.plot)
    check_folder_of("--json", arguments.json)
    if arguments.file is not None:
        return
    if not (arguments.drafter / "config.json").is_file():
        raise ValueError(f"--drafter {arguments.drafter} is no drafter folder")


def find(arguments: argparse.Namespace) -> Path | None:
    """The newest cached table of this pair, device and version, if there is one.

    Data type and threads are the server's choice: what is shown names them.

    Raises:
        ValueError: a target or drafter that cannot be read.
    """
    wanted = _wanted(arguments)
    found = []
    for path in (cache_root() / FOLDER).glob("*.json"):
        try:
            content = cost_file.read(path)
        except ValueError:
            continue  # a server says so and measures anew
        same = all(getattr(content.key, k) == v for k, v in wanted.items())
        if same and cost_file.reach(content, "requests") >= arguments.max_num_seqs:
            found.append((path.stat().st_mtime, path))
    return max(found)[1] if found else None


def _wanted(arguments: argparse.Namespace) -> dict[str, Any]:
    # Late: torch, and through it seconds.
    from vllm_dspark.integration import compat
    from vllm_dspark.integration.device import device_name
    from vllm_dspark.model.checkpoint import weights_hash
    from vllm_dspark.model.target import identify_target

    return {
        "target": identify_target(arguments.target).hash,
        "drafter": weights_hash(arguments.drafter),
        "device": device_name(),
        "vllm_version": compat.vllm_version()[1],
        "compiled": arguments.compiled,
        "tensor_parallel": 1,
    }


def measure(arguments: argparse.Namespace, console: Console) -> Path:
    """Let a server measure the table; puts it into the cache.

    Raises:
        ValueError: the server did not start, or measured nothing, with its own words;
            or the cache cannot be written.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-dspark-") as empty:
        with _server(arguments, Path(empty)) as server:
            wait_for(console, server, "starting a server that measures its steps")
            files = list((Path(empty) / FOLDER).glob("*.json"))
            if not files:
                raise ValueError(f"the server measured no step costs\n{server.why()}")
        content = cost_file.read(files[0])
    kept = cost_file.save(cache_root(), content)
    if kept is None:
        raise ValueError(f"the cache {cache_root()} cannot be written")
    return kept


def _server(arguments: argparse.Namespace, cache: Path) -> Server:
    speculation = {
        "method": "dspark",
        "model": str(arguments.drafter.absolute()),
        "draft_sample_method": "probabilistic",
    }
    return Server(
        arguments.target,
        [
            *["--max-model-len", str(_MAX_MODEL_LEN)],
            *["--max-num-seqs", str(arguments.max_num_seqs)],
            *([] if arguments.compiled else ["--enforce-eager"]),
            *speculative_arguments(speculation),
        ],
        log=cache_root() / "logs" / "serve-profile.log",
        # An empty cache: there is nothing that it could take instead of measuring.
        environment={**SERVER_ENVIRONMENT, "VLLM_DSPARK_CACHE": str(cache)},
        port=arguments.port,
    )

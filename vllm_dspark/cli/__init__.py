"""The `vllm-dspark` command: one module per subcommand.

A subcommand module offers ``add_parser(subparsers)``, which sets ``run`` on its
parser: a function that takes the parsed arguments and returns the exit status.
Modules are imported only to build the parser, so none may import torch or
transformers at the top.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence

SUBCOMMANDS = (
    "demo",
    "check",
    "synthesize",
    "train",
    "calibrate",
    "evaluate",
    "profile",
    "convert",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="vllm-dspark",
        description="DSpark speculative decoding for vLLM.",
        epilog="First steps: `vllm-dspark check`, then `vllm-dspark demo`.",
    )
    subparsers = parser.add_subparsers(dest="subcommand", required=True)
    for name in SUBCOMMANDS:
        importlib.import_module(f"vllm_dspark.cli.{name}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; a user's mistake ends in one line and exit status 2."""
    arguments = build_parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except (ValueError, FileNotFoundError) as error:
        print(f"vllm-dspark {arguments.subcommand}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return status

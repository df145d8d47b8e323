"""`vllm-dspark convert`: a drafter's folder in the other of its two layouts."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dspark import provenance
from vllm_dspark.cli.check import target_config

_EXAMPLE = """example:
  vllm-dspark convert models/smollm2-135m-dspark /tmp/as-speculators --to speculators
  vllm-dspark convert /tmp/as-speculators /tmp/as-deepspec --to deepspec
  vllm-dspark convert ./qwen3-8b.dspark ./qwen3-8b-deepspec --to deepspec \\
      --target Qwen/Qwen3-8B
"""


def add_parser(subparsers: Any) -> None:
    """Add the ``convert`` subcommand."""
    parser = subparsers.add_parser(
        "convert",
        help="a drafter's folder in DeepSpec's layout or the speculators library's",
        description=(
            "Write a drafter's folder in the other layout: tensors bit by bit, the "
            "configuration without loss, the weights' hash unchanged. `vllm serve` "
            "and `vllm-dspark check` read both."
        ),
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", type=Path, metavar="SRC", help="drafter folder")
    add("out", type=Path, metavar="OUT", help="folder to create")
    add("--to", choices=("deepspec", "speculators"), required=True, help="its layout")
    add(
        "--target",
        help="the drafter's target, a folder or a name in the local HF cache: its "
        "depth goes to DeepSpec's layout, its name to speculators'",
    )
    add("--json", type=Path, metavar="FILE", help="write what was done to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    from vllm_dspark.model.convert import Target, convert

    console = Console()
    target = None
    if arguments.target:
        target = Target(arguments.target, target_config(arguments.target))
    with console.status(f"converting {arguments.source}"):
        done = convert(arguments.source, arguments.out, arguments.to, target)
    lines = (
        f"{arguments.source} ({done.source_layout}) -> {arguments.out} ({done.layout})",
        f"  tensors         {done.num_tensors}, {done.num_bytes:,} bytes",
        f"  weights sha256  {done.weights_hash} (unchanged)",
        f"  also copied     {', '.join(done.beside) or 'nothing'}",
        *(f"  note: {note}" for note in done.notes),
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if arguments.json:
        record = {
            "source": str(arguments.source),
            "out": str(arguments.out),
            "target": arguments.target,
            **asdict(done),
            "provenance": provenance.collect(),
        }
        provenance.write_json(arguments.json, record)
    return 0

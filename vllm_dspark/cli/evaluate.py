"""`vllm-dspark evaluate`: how much a drafter's drafts and confidences are worth.

Decodes held-out prompts with real rounds of verification and reports τ, acceptance by
position, the quality of the confidences, and what a static threshold on them would do,
per dataset and as their mean. Several drafters and vLLM's other methods side by side.
"""

import argparse
import signal
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_dspark import provenance
from vllm_dspark.calibration import plots
from vllm_dspark.cli.rounds import arguments as shared
from vllm_dspark.cli.rounds import display, evaluation, methods
from vllm_dspark.cli.signals import interrupt

_EXAMPLE = """example:
  vllm-dspark evaluate --target TARGET --drafter DRAFTER --prompts heldout.jsonl \\
      --limit 20 --json result.json --png result.png        some minutes on a laptop
  vllm-dspark evaluate --target TARGET --drafter A B --method ngram --prompts a.jsonl

`vllm-dspark demo --paths` prints the folders of the demo's target and drafter.
A prompt file has one JSON object a line: {"dataset": "gsm8k", "messages": [...]}, or
"prompt" (text) for a base model. The confidences' calibration is read from
dspark_calibration.json beside the drafter's weights, if it is there.
"""
# vLLM's methods that need no model of their own.
METHODS = ("ngram", "suffix")
METHOD_TOKENS = 5


def add_parser(subparsers: Any) -> None:
    """Add the ``evaluate`` subcommand."""
    parser = subparsers.add_parser(
        "evaluate",
        help="tokens per round, acceptance and confidences of drafters",
        description="Evaluate drafters on held-out prompts.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add(parser)
    add = parser.add_argument
    add("--drafter", type=Path, nargs="+", default=[], metavar="FOLDER")
    add("--method", choices=METHODS, nargs="+", default=[],
        help="other methods of vLLM to put beside (acceptance only)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write the result to FILE")
    add("--png", type=Path, metavar="FILE", help="draw the figures into FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    signal.signal(signal.SIGTERM, interrupt)
    _check(arguments)
    console = Console()
    evaluations = _evaluate(arguments, console)
    for temperature in arguments.temperature:
        mine = [e for e in evaluations if e.temperature == temperature]
        display.print_evaluations(console, temperature, mine)
    if arguments.png:
        plots.evaluations(evaluations, arguments.png)
        console.print(f"drawn: {arguments.png}")
    if arguments.json:
        result = evaluation.as_json(evaluations)
        result["engine"] = arguments.engine
        result["settings"] = _settings(arguments)
        result["provenance"] = provenance.collect()
        provenance.write_json(arguments.json, result)
        console.print(f"written: {arguments.json}")
    return 0


def _check(arguments: argparse.Namespace) -> None:
    shared.check(arguments)
    shared.check_folder_of("--json", arguments.json)
    shared.check_folder_of("--png", arguments.png)
    if not arguments.drafter and not arguments.method:
        raise ValueError("nothing to evaluate: give --drafter FOLDER (or --method)")
    if arguments.method and arguments.engine != "vllm":
        raise ValueError("--method is vLLM's: use it with --engine vllm")


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    names = (
        *("target", "temperature", "max_tokens", "limit", "num_speculative_tokens"),
        *("draft_sample_method", "dtype", "concurrency", "max_prompt_tokens"),
    )
    return {
        **{name: getattr(arguments, name) for name in names},
        "prompts": [str(file) for file in arguments.prompts],
    }


def _evaluate(arguments: argparse.Namespace, console: Console) -> list[Any]:
    """One `Evaluation` per drafter or method, and temperature."""
    # Every folder is checked before the first one takes minutes.
    drafts = [shared.drafting(arguments, folder) for folder in arguments.drafter]
    names = _names(arguments.drafter)
    prompts = shared.load_prompts(arguments, console)
    found = []
    for name, drafting in zip(names, drafts, strict=True):
        console.rule(name)
        texts = shared.collect(arguments, drafting, prompts, console)
        found += methods.from_rounds(name, drafting, texts)
    asked = shared.decoding(arguments)
    width = arguments.num_speculative_tokens or METHOD_TOKENS
    for method in arguments.method:
        console.rule(method)
        found += methods.from_counters(method, width, asked, prompts, console)
    return found


def _names(folders: list[Path]) -> list[str]:
    """Short names of folders, longer ones where two would be the same."""
    names = [folder.absolute().name for folder in folders]
    return [
        name if names.count(name) == 1 else str(folder)
        for name, folder in zip(names, folders, strict=True)
    ]

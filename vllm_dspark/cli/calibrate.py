"""`vllm-dspark calibrate`: make a drafter's confidences mean what they say.

Decodes prompts with real rounds of verification, fits the temperatures of sequential
temperature scaling, and writes `dspark_calibration.json` beside the drafter's weights.
"""

import argparse
import math
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_dspark import provenance
from vllm_dspark.calibration import file, throughput
from vllm_dspark.calibration.fitting import Fit, fit
from vllm_dspark.calibration.rounds import PromptRounds, Rounds, collect
from vllm_dspark.cli.rounds import arguments as shared
from vllm_dspark.cli.rounds import markdown
from vllm_dspark.cli.rounds.evaluation import finite
from vllm_dspark.cli.rounds.settings import Drafting
from vllm_dspark.cli.signals import interrupt

_EXAMPLE = """example:
  vllm-dspark calibrate --target TARGET --drafter DRAFTER --prompts prompts.jsonl \\
      --limit 50 --report calibration-report            some minutes on a laptop

`vllm-dspark demo --paths` prints the folders of the demo's target and drafter. Take
prompts of the kind you serve, not those you evaluate with: a few thousand rounds for
each temperature, so some hundred prompts.
"""


def add_parser(subparsers: Any) -> None:
    """Add the ``calibrate`` subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit the confidences' temperatures",
        description="Calibrate a drafter's confidences on real rounds.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared.add(parser)
    add = parser.add_argument
    add("--drafter", type=Path, required=True, metavar="FOLDER")
    add("--out", type=Path, metavar="FILE",
        help=f"default: {file.NAME} beside the weights")  # fmt: skip
    add("--report", type=Path, metavar="DIR", help="write a report and its figures")
    add("--no-bias", action="store_true",
        help="temperatures only, as in the paper")  # fmt: skip
    add("--cost-curve", metavar="TOKENS:MS,…",
        help="of the target's step, for the report (default: the demo's)")  # fmt: skip
    add("--draft-cost", metavar="REQUESTS:MS,…", help="of drafting, likewise")
    add("--json", type=Path, metavar="FILE", help="write the result to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    signal.signal(signal.SIGTERM, interrupt)
    cost, drafting, out = _check(arguments)
    console = Console()
    prompts = shared.load_prompts(arguments, console)
    if not arguments.report and not arguments.json:
        console.print("(--report DIR adds diagrams, bias by domain, and drift)")
    texts = shared.collect(arguments, drafting, prompts, console)
    found: dict[float, tuple[Rounds, Fit]] = {}
    for temperature, mine in texts.items():
        rounds = collect(mine, drafting.num_speculative_tokens)
        with console.status(f"fitting temperature {temperature:g}"):
            found[temperature] = rounds, fit(rounds, not arguments.no_bias)
        console.print(_table(temperature, rounds, found[temperature][1]))
    result = _write(arguments, drafting, out, texts, found)
    console.print(f"written: {out}")
    if arguments.report:
        title = f"{result['drafter']} for {result['target']}"
        bias = not arguments.no_bias
        figures = markdown.write(arguments.report, title, found, bias, cost)
        result["report"] = {f"{t:g}": value for t, value in figures.items()}
        console.print(f"report: {arguments.report / 'report.md'}")
    if arguments.json:
        provenance.write_json(arguments.json, finite(result))
        console.print(f"written: {arguments.json}")
    return 0


def _check(
    arguments: argparse.Namespace,
) -> tuple[throughput.CostCurve, Drafting, Path]:
    """Everything that can be refused before the work begins."""
    shared.check(arguments)
    out = arguments.out or arguments.drafter / file.NAME
    shared.check_folder_of("--out", out)
    shared.check_folder_of("--json", arguments.json)
    if arguments.report:
        shared.check_folder_of("--report", arguments.report)
    default = throughput.DEMO_COST
    verify, draft = arguments.cost_curve, arguments.draft_cost
    cost = throughput.CostCurve(
        throughput.parse_curve(verify) if verify else default.verify,
        throughput.parse_curve(draft) if draft else default.draft,
    )
    drafting = shared.drafting(arguments, arguments.drafter)
    from vllm_dspark.model.checkpoint import load_config

    if not load_config(arguments.drafter).enable_confidence_head:
        raise ValueError(
            f"{arguments.drafter} has no confidence head, so there is nothing to "
            "calibrate"
        )
    return cost, drafting, out


def _write(
    arguments: argparse.Namespace,
    drafting: Drafting,
    out: Path,
    texts: dict[float, list[PromptRounds]],
    found: dict[float, tuple[Rounds, Fit]],
) -> dict[str, Any]:
    """Write the calibration; returns what it says, for ``--json``."""
    from vllm_dspark.model.checkpoint import weights_hash

    prompts = next(iter(texts.values()))
    facts = {
        "num_speculative_tokens": drafting.num_speculative_tokens,
        "draft_sample_method": drafting.draft_sample_method,
    }
    settings = [
        file.setting(t, fitted, rounds=len(rounds), prompts=len(texts[t]), **facts)
        for t, (rounds, fitted) in found.items()
    ]
    names = [path.name for path in arguments.prompts]
    data = {
        "label": f"{', '.join(names)}, {len(prompts)} prompts",
        "datasets": dict(Counter(text.dataset for text in prompts)),
        "max_tokens": arguments.max_tokens,
        "engine": arguments.engine,
        "dtype": arguments.dtype,
    }
    target = Path(arguments.target)
    facts = {
        "target": target.name if target.is_dir() else arguments.target,
        "drafter": arguments.drafter.absolute().name,
        "provenance": provenance.collect(),
    }
    file.write(out, weights_hash(arguments.drafter), settings, data, facts)
    return {"file": str(out), "settings": settings, "data": data, **facts}


def _table(temperature: float, rounds: Rounds, fitted: Fit) -> Table:
    note = f"; {fitted.note}" if fitted.note else ""
    table = Table(title=f"temperature {temperature:g}: {len(rounds)} rounds{note}")
    table.add_column("position")
    for k in range(1, rounds.width + 1):
        table.add_column(str(k), justify="right")
    for label, values in (
        ("ECE before, %", fitted.ece_before),
        ("ECE after (held out), %", fitted.ece_after),
        ("ECE of perfect, %", fitted.ece_floor),
        ("AUC before, %", fitted.auc_before),
        ("AUC after (held out), %", fitted.auc_after),
    ):
        table.add_row(label, *(_percent(value) for value in values))
    table.add_row("temperature", *(f"{t:.2f}" for t in fitted.scaling.temperature))
    table.add_row("bias", *(f"{b:+.2f}" for b in fitted.scaling.bias))
    return table


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f}"

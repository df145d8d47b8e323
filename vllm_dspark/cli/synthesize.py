"""`vllm-dspark synthesize`: the target writes the text its drafter is trained on.

Prompts come from files, from the target itself, or both; `vllm serve` answers them. The
same command goes on where it was stopped or killed.
"""

import argparse
import asyncio
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from vllm_dspark import provenance
from vllm_dspark.cache import cache_root
from vllm_dspark.cli import display, distribution
from vllm_dspark.cli.server import Server, speculative_arguments
from vllm_dspark.cli.settings import SERVER_ENVIRONMENT
from vllm_dspark.cli.signals import interrupt
from vllm_dspark.cli.synthesize_display import showing
from vllm_dspark.cli.synthesize_work import NO_FILE, Work, prepare

if TYPE_CHECKING:
    from vllm_dspark.train.synthesize import Synthesis

SERVED_NAME = "target"
_BATCH_TOKENS = 4096  # of one step, if one request may not have more
_TOTALS = ("samples", "prompt_tokens", "response_tokens")
_EXAMPLE = """example:
  vllm-dspark synthesize --target TARGET --out data --samples 2000
        the target writes its own prompts; a laptop does this in under an hour for a
        model of 135M parameters
  vllm-dspark synthesize --target TARGET --out data --prompts chat.jsonl code.jsonl \\
        --tokens 1000000 --temperatures 0:0.5,1.0:0.5
  the same command again goes on where it was stopped; more --samples adds to it
"""


def add_parser(subparsers: Any) -> None:
    """Add the ``synthesize`` subcommand."""
    parser = subparsers.add_parser(
        "synthesize",
        help="the target writes the text its drafter is trained on",
        description="Let a target answer prompts, as training data for its drafter.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--target", required=True, help="folder, or a name in the local HF cache")
    add("--out", type=Path, required=True, metavar="DIR", help="token folder to fill")
    add(
        "--prompts",
        nargs="+",
        default=[NO_FILE],
        metavar="FILE",
        help='JSONL rows {"messages": [...]} or {"prompt": "text"}, optionally with '
        '"dataset"; and/or none: the target writes its own (default: none)',
    )
    add("--samples", type=int, metavar="N", help="stop at N samples")
    add("--tokens", type=int, metavar="N", help="stop at N response tokens")
    add(
        "--temperatures",
        default="0:0.5,0.6:0.25,1.0:0.25",
        metavar="T:SHARE,...",
        help="of the answers (%(default)s)",
    )
    add("--max-prompt-tokens", type=int, default=512, metavar="N")
    add("--max-response-tokens", type=int, default=256, metavar="N")
    add("--min-response-tokens", type=int, default=4, metavar="N")
    add("--max-turn-tokens", type=int, default=160, help="of prompts it writes itself")
    add("--self-share", type=float, default=0.5, help="with files and none (0.5)")
    add("--seed", type=int, default=0)
    add("--drafter", type=Path, help="answer with this DSpark drafter: the same text")
    add("--concurrency", type=int, default=128, help="requests at a time (%(default)s)")
    add("--enforce-eager", action="store_true", help="start sooner, generate slower")
    add("--port", type=int, help="port of the server (default: a free one)")
    add("--json", type=Path, metavar="FILE", help="write a summary to FILE")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand."""
    signal.signal(signal.SIGTERM, interrupt)
    console = Console()
    _check_arguments(arguments)
    if trouble := distribution.inspect().trouble:
        raise ValueError(trouble)
    work = prepare(arguments)
    with work.writer:
        try:
            result = _synthesize(arguments, work, console)
        except KeyboardInterrupt:
            _show_state(console, work, "stopped")
            console.print("the same command goes on from here")
            return 130
    if arguments.json:
        provenance.write_json(arguments.json, result)
        console.print(f"written: {arguments.json}", highlight=False)
    return 0


def _check_arguments(arguments: argparse.Namespace) -> None:
    if arguments.concurrency < 1:
        raise ValueError(f"--concurrency is {arguments.concurrency}; at least 1")
    if arguments.drafter and not (arguments.drafter / "config.json").is_file():
        raise ValueError(f"--drafter {arguments.drafter} is no drafter folder")
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        raise ValueError(f"--json: there is no folder {arguments.json.parent}")


def _server(arguments: argparse.Namespace, work: Work) -> Server:
    settings = work.settings
    answer = max(settings.max_response_tokens, settings.max_turn_tokens)
    speculation = None
    if arguments.drafter:
        speculation = {
            "method": "dspark",
            "model": str(arguments.drafter.absolute()),
            # Answers are sampled, so drafts are too; greedy rows stay greedy.
            "draft_sample_method": "probabilistic",
        }
    length = settings.max_prompt_tokens + answer
    return Server(
        work.folder,
        [
            *["--served-model-name", SERVED_NAME],
            *["--max-model-len", str(length)],
            # vLLM 0.32 rewinds a seeded request's generator after each part of a
            # prefill, which torch's CPU generators refuse ("CPU Generator does not use
            # offset") and the engine dies: let no prefill have parts.
            "--no-enable-chunked-prefill",
            *["--max-num-batched-tokens", str(max(_BATCH_TOKENS, length))],
            *["--max-num-seqs", str(arguments.concurrency)],
            *(["--enforce-eager"] if arguments.enforce_eager else []),
            *speculative_arguments(speculation),
        ],
        log=cache_root() / "logs" / f"serve-synthesize-{arguments.out.name}.log",
        environment=SERVER_ENVIRONMENT,
        port=arguments.port,
    )


def _synthesize(
    arguments: argparse.Namespace, work: Work, console: Console
) -> dict[str, Any]:
    """Start the server, ask until the goal is reached; the summary for machines."""
    manifest = work.writer.manifest
    have = _totals(work)
    if work.goal.reached(have["samples"], have["response_tokens"]):
        _show_state(console, work, "nothing to do, the goal was reached before")
        return _summary(work, {})
    _show_state(console, work, "going on" if manifest.shards else "new")
    with _server(arguments, work) as server:
        start_seconds = display.wait_for(console, server, "starting vllm serve")
        start = time.monotonic()
        reached, generated = _ask(arguments, work, console, server)
        seconds = time.monotonic() - start
    end = "done" if reached else "the prompts are used up; the goal was not reached"
    _show_state(console, work, end)
    console.print(f"{generated / seconds:.0f} tokens/s over {seconds:.0f} s")
    figures = {
        "seconds": seconds,
        "start_seconds": start_seconds,
        "generated_tokens": generated,
        "tokens_per_second": generated / seconds,
        "goal_reached": reached,
    }
    return _summary(work, figures)


def _ask(
    arguments: argparse.Namespace, work: Work, console: Console, server: Server
) -> tuple[bool, int]:
    from vllm_dspark.cli.completions import Completions
    from vllm_dspark.train.synthesize import Synthesis

    async def ask(progress: "Callable[[Synthesis], None]") -> tuple[bool, int]:
        async with Completions(server, SERVED_NAME) as answer:
            synthesis = Synthesis(
                work.settings, work.prompts.prompts, work.renderer, work.writer, answer
            )
            reached = await synthesis.run(
                work.goal, arguments.concurrency, lambda: progress(synthesis)
            )
            return reached, synthesis.generated

    with showing(console, work.goal) as progress:
        return asyncio.run(ask(progress))


def _totals(work: Work) -> dict[str, int]:
    shards = work.writer.manifest.shards
    return {key: sum(getattr(shard, key) for shard in shards) for key in _TOTALS}


def _show_state(console: Console, work: Work, what: str) -> None:
    have, shards = _totals(work), len(work.writer.manifest.shards)
    dropped = work.writer.manifest.counts.get("dropped", {})
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
    console.print(
        f"{what}: {work.writer.folder} holds {have['samples']:,} samples, "
        f"{have['response_tokens']:,} response tokens, {shards} shards; "
        f"dropped: {why or 'none'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _summary(work: Work, figures: dict[str, Any]) -> dict[str, Any]:
    manifest = work.writer.manifest
    return {
        "out": work.writer.folder.name,
        "target": asdict(manifest.target),
        "sampling": manifest.sampling,
        **_totals(work),
        "counts": manifest.counts,
        "run": figures,
        "provenance": provenance.collect(),
    }

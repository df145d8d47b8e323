"""What the demo shows: progress while a server starts, answers, the result table.

On a terminal a spinner moves; in a pipe or a CI log a line appears every few seconds.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_dspark.cli.arms import Arm, Printer
from vllm_dspark.cli.near_tie import Difference
from vllm_dspark.cli.server import Server

_QUIET_SECONDS = 10.0  # between lines when there is no terminal


@contextmanager
def waiting(console: Console, what: str) -> Iterator[Any]:
    """Give a ``progress(elapsed, line)`` callback that shows life."""
    if console.is_terminal:
        with console.status(what) as status:

            def spin(elapsed: float, line: str) -> None:
                # Text, not markup: log lines are full of square brackets.
                width = max(20, console.width - len(what) - 12)
                status.update(Text(f"{what} {elapsed:4.0f} s  {line[:width]}"))

            yield spin
        return
    shown = 0.0

    def note(elapsed: float, line: str) -> None:
        nonlocal shown
        if elapsed - shown >= _QUIET_SECONDS:
            shown = elapsed
            console.print(f"  {elapsed:4.0f} s  {line[:100]}", markup=False)

    console.print(what)
    yield note


def wait_for(console: Console, server: Server, what: str) -> float:
    """Wait for a server with visible progress; returns its start time."""
    with waiting(console, what) as progress:
        seconds = server.wait_ready(progress)
    console.print(f"server ready after {seconds:.0f} s (log: {server.log})")
    return seconds


def answer_printer(console: Console, name: str, prompt: str) -> Printer:
    """Print a question, then return what prints its answer chunk by chunk.

    Chunks of more than one token (accepted drafts) are green.
    """
    console.print(f"\n[bold]{name}[/bold]  {prompt}", highlight=False)

    def show(text: str, tokens: int) -> None:
        style = "green" if tokens > 1 else ""
        console.print(Text(text, style), end="", soft_wrap=True)

    return show


def result_table(arms: dict[str, Arm]) -> Table:
    """Tokens per second by prompt and arm, with the ratio of the two."""
    fast, plain = arms.values()
    table = Table(title="output tokens per second (median, prefill included)")
    table.add_column("prompt")
    for arm in arms.values():
        table.add_column(arm.name, justify="right")
    table.add_column("ratio", justify="right")
    for name, answer in fast.answers.items():
        one, other = answer.tokens_per_second, plain.answers[name].tokens_per_second
        table.add_row(name, f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}×")
    one, other = fast.tokens_per_second, plain.tokens_per_second
    row = ["geometric mean", f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}×"]
    table.add_row(*row, style="bold")
    return table


def print_speculation(console: Console, arm: Arm) -> None:
    """τ and acceptance by position, as the server counted them."""
    counts = arm.speculation
    if counts is None or counts.accepted_length is None:
        console.print("the server counted no speculation round")
        return
    shares = " ".join(f"{share:.2f}" for share in counts.acceptance_per_position)
    console.print(
        f"accepted length τ = {counts.accepted_length:.2f} tokens a round "
        f"({counts.rounds} rounds); acceptance by position: {shares}",
        highlight=False,
    )


def print_differences(console: Console, found: list[Difference], total: int) -> None:
    """Say whether the texts are equal and how close the first differences were."""
    if not found:
        console.print(f"texts: equal, token for token ({total} of {total})")
        return
    console.print(f"texts: {total - len(found)} of {total} equal, token for token")
    for d in found:
        console.print(
            f"  {d.prompt}: first difference at token {d.position}: "
            f"{d.texts[0]!r} or {d.texts[1]!r}, whose logits are "
            f"{d.gap_float32:.3f} apart in the target in float32 "
            f"({d.gap_bfloat16:.3f} in bfloat16; ranks {d.ranks[0]} and {d.ranks[1]})",
            highlight=False,
            markup=False,
        )

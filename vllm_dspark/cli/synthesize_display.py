"""How far `vllm-dspark synthesize` is: a bar, tokens per second, time left.

On a terminal a bar moves; in a pipe or a log a line appears now and then.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

if TYPE_CHECKING:
    from vllm_dspark.train.synthesize import Goal, Synthesis

_QUIET_SECONDS = 10.0  # between lines when there is no terminal


@contextmanager
def showing(console: Console, goal: "Goal") -> "Iterator[Callable[[Synthesis], None]]":
    """Give a callback that shows how far a synthesis is."""
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
    start = time.monotonic()
    first: float | None = None
    shown = 0.0
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("first answers are on their way", total=1.0)

        def show(synthesis: "Synthesis") -> None:
            nonlocal first, shown
            elapsed = time.monotonic() - start
            done = share_done(synthesis, goal)
            first = done if first is None else first
            line = describe(synthesis, elapsed, done, first)
            bar.update(task, completed=done, description=line)
            if not console.is_terminal and elapsed - shown >= _QUIET_SECONDS:
                shown = elapsed
                console.print(f"  {done:4.0%}  {line}", highlight=False)

        yield show


def share_done(synthesis: "Synthesis", goal: "Goal") -> float:
    """How much of the goal is reached, 0 to 1; by the number that is nearer."""
    ledger = synthesis.ledger
    pairs = ((ledger.samples, goal.samples), (ledger.response_tokens, goal.tokens))
    return min(1.0, max(have / want for have, want in pairs if want is not None))


def describe(synthesis: "Synthesis", elapsed: float, done: float, first: float) -> str:
    """One line: kept, dropped, tokens per second of this run, time left.

    Args:
        synthesis: as it is now.
        elapsed: seconds of this run.
        done: share of the goal.
        first: the same when the run began.
    """
    ledger = synthesis.ledger
    rate = synthesis.generated / max(elapsed, 1e-9)
    left = "?"
    if done > first:
        seconds = round((1 - done) / (done - first) * elapsed)
        left = f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
    return (
        f"{ledger.samples:,} samples, {ledger.response_tokens:,} tokens, "
        f"{sum(ledger.dropped.values()):,} dropped, {rate:,.0f} tokens/s, ETA {left}"
    )

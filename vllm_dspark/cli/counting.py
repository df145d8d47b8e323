"""Progress of counted work: a bar on a terminal, elsewhere a line every tenth."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def counting(console: Console, what: str, total: int) -> Iterator[Callable[[], None]]:
    """Give a callback for each of ``total`` pieces that is done."""
    if not console.is_terminal:
        yield _lines(console, what, total)
        return
    columns = Progress.get_default_columns()[:-1]
    extra = (TimeRemainingColumn(), TimeElapsedColumn())
    with Progress(*columns, *extra, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def _lines(console: Console, what: str, total: int) -> Callable[[], None]:
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done * 10 // total > (done - 1) * 10 // total:
            console.print(f"{what}: {done} of {total}", highlight=False)

    return advance

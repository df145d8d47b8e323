"""What a load sweep shows while it runs: a bar with the time left, a line per point."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from _sweep_grid import Point
from rich import progress
from rich.console import Console

from vllm_dspark.cli.display import waiting


class Progress:
    """A progress bar in seconds, corrected by what the points really took.

    Args:
        expected: seconds that a point should take, by what is known now.
    """

    def __init__(self, expected: Callable[[Point], float]) -> None:
        self._expected = expected
        # This very file: the client's output is redirected while the bar moves.
        self._console = Console(file=sys.stdout, highlight=False)
        self._coming: list[Point] = []
        self._took = 0.0
        self._planned = 0.0
        self._bar: progress.Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False)

    @contextmanager
    def waiting(self, what: str) -> Iterator[Callable[[float, str], None]]:
        """Show that something is under way that is no point."""
        self._end()
        with waiting(self._console, what) as show:
            yield show

    def begin(self, coming: Iterable[Point]) -> None:
        """Show the bar; ``coming`` are all points that are left."""
        self._coming = list(coming)
        if self._console.is_terminal:
            columns = ("{task.description}", progress.BarColumn())
            self._bar = progress.Progress(
                *columns,
                progress.TimeElapsedColumn(),
                console=self._console,
                redirect_stdout=False,
            )
            self._bar.add_task("", total=None)
            self._bar.start()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def left(self) -> float:
        """Seconds until all points are done."""
        pace = self._took / self._planned if self._planned else 1.0
        return pace * sum(map(self._expected, self._coming))

    def now(self, point: Point) -> None:
        """Say which point is being measured."""
        self._planned += self._expected(point)
        if self._bar is None:
            return
        text = f"{_name(point)}, {_duration(self.left())} left"
        total = self._took + self.left()
        self._bar.update(
            self._bar.task_ids[0], description=text, completed=self._took, total=total
        )

    def done(self, point: Point, record: dict[str, Any]) -> None:
        """Note a finished point and print its figures."""
        self._took += record["duration"]
        self._coming = [p for p in self._coming if p != point]
        tau, verified = record["tau"], record["verify_length"]
        figures = f"{record['output_throughput']:7.1f} tok/s"
        if tau is not None and verified is not None:
            figures += f"  τ {tau:.2f}  verified {verified:.2f}"
        self.say(f"{_name(point):48} {figures}  ({_duration(self.left())} left)")


def _name(point: Point) -> str:
    of = f" {point.dataset}" if point.dataset else ""
    load = point.load if point.rate is not None else f"C={point.load}"
    return f"round {point.run + 1}, {load}, {point.arm}{of}"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"

"""The points of the load sweep, their order, and the files that hold them.

The files are those of `vllm bench sweep serve`: one folder per arm and load with
``run=N.json`` and ``summary.json``, so that vLLM's plot commands read them. Points of
one dataset alone lie in a folder beside, so that no plot mixes them with the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _bench_common import in_turn, provenance

GRID = "mixed"
OPEN = "open-loop"
SPLIT = "by-dataset"
TOPS = (GRID, OPEN, SPLIT)


@dataclass(frozen=True, slots=True)
class Load:
    """How requests come: one after the other from each client, or by themselves.

    Attributes:
        clients: of a closed loop; None in the open loop.
        rate: requests/s of an open loop.
        burstiness: of their times: 1 is a Poisson process, less comes in bursts.
        seed: of these times.
    """

    clients: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement.

    Attributes:
        concurrency: clients of a closed loop, 0 in the open loop.
        dataset: the only one, or domain; None where all are mixed.
        rate: requests/s of an open loop.
    """

    arm: str
    concurrency: int
    run: int
    dataset: str | None = None
    rate: float | None = None

    @property
    def load(self) -> str:
        """Names the load among all loads of the sweep."""
        return str(self.concurrency) if self.rate is None else rate_key(self.rate)

    @property
    def top(self) -> str:
        """The folder of its kind of points."""
        if self.rate is not None:
            return OPEN
        return GRID if self.dataset is None else SPLIT


def rate_key(rate: float) -> str:
    """How a rate is written where loads are keys: `2/s`."""
    return f"{rate:g}/s"


def points(
    arms: Sequence[str],
    concurrency: Sequence[int],
    runs: int,
    split: Iterable[tuple[str, str, int]] = (),
    one_at_a_time: bool = False,
    rates: Sequence[float] = (),
) -> list[Point]:
    """Every point, in the order of measuring.

    The arms take turns at each load, and another one begins at the next load and in the
    next run: what the machine does in those minutes meets all arms alike.

    Args:
        split: (arm, dataset, concurrency) measured once a run after the grid.
        one_at_a_time: each arm does all its loads of a run before the next arm.
        rates: requests/s of open loops, after the closed ones.
    """
    found: list[Point] = []
    for run in range(runs):
        loads = [*((c, None) for c in concurrency), *((0, r) for r in rates)]
        grid = [
            Point(arm, clients, run, rate=rate)
            for i, (clients, rate) in enumerate(loads)
            for arm in in_turn(arms, run + (0 if one_at_a_time else i))
        ]
        grid += [Point(arm, load, run, dataset) for arm, dataset, load in split]
        if one_at_a_time:
            order = {arm: i for i, arm in enumerate(in_turn(arms, run))}
            grid.sort(key=lambda point: order[point.arm])  # stable
        found += grid
    return found


class Results:
    """The result folder of a sweep.

    Args:
        folder: created where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def file(self, point: Point) -> Path:
        """Where a point's record belongs; vLLM's name for the folder."""
        load = f"max_concurrency={point.concurrency}"
        if point.rate is not None:
            load = f"request_rate={point.rate}"
        if point.dataset is not None:
            load += f"-dataset={point.dataset}"
        # As vLLM's sanitize_filename does.
        name = f"SERVE--arm={point.arm}-BENCH--{load}".replace("/", "_")
        return (
            self.folder / point.top / name.replace("..", "__") / f"run={point.run}.json"
        )

    def has(self, point: Point) -> bool:
        return self.file(point).exists()

    def add(self, point: Point, record: dict[str, Any]) -> None:
        """Write a point's record and its folder's summary."""
        file = self.file(point)
        file.parent.mkdir(parents=True, exist_ok=True)
        parameters = {"run_number": point.run, "arm": point.arm}
        if point.rate is None:
            parameters |= {"max_concurrency": point.concurrency}
        else:
            parameters |= {"request_rate": point.rate}
        parameters |= {"dataset": point.dataset or "mixed"}
        _write(file, {**record, **parameters})
        _write(file.parent / "summary.json", _runs(file.parent))
        self._failure(point).unlink(missing_ok=True)

    def add_failure(self, point: Point, why: str) -> None:
        """Note a point that could not be measured; a resumed sweep tries it again."""
        file = self._failure(point)
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, {"run_number": point.run, "error": why})

    def _failure(self, point: Point) -> Path:
        return self.file(point).with_suffix(".failure.json")

    def records(self, top: str) -> list[dict[str, Any]]:
        """Every record of one kind of points: `GRID`, `OPEN` or `SPLIT`."""
        folders = sorted((self.folder / top).glob("SERVE--*"))
        return [record for folder in folders for record in _runs(folder)]

    def settings(self, wanted: dict[str, Any], resume: bool) -> dict[str, Any]:
        """Keep what the figures depend on, or check it against the sweep resumed.

        Returns:
            What is kept, the numbers of prompts included if they are known.

        Raises:
            ValueError: the folder holds another sweep, or none that could go on.
        """
        file = self.folder / "settings.json"
        if not resume:
            if any(self.folder.glob("*/SERVE--*/run=*.json")):
                raise ValueError(
                    f"{self.folder} holds a sweep; continue it with --resume, or name "
                    "another --out"
                )
            _write(file, wanted)
            return wanted
        if not file.exists():
            raise ValueError(f"--resume: {self.folder} holds no sweep")
        kept: dict[str, Any] = json.loads(file.read_text())
        for key, value in provenance.portable(wanted).items():  # as in the file
            if kept.get(key) != value:
                raise ValueError(
                    f"--resume: {key} is {value!r}, but {self.folder} was measured "
                    f"with {kept.get(key)!r}"
                )
        return kept

    def keep_counts(self, settings: dict[str, Any]) -> None:
        """Keep the numbers of prompts, so that a resumed sweep sends the same."""
        _write(self.folder / "settings.json", settings)

    def write(self, name: str, content: dict[str, Any]) -> None:
        _write(self.folder / name, content)


def _runs(folder: Path) -> list[dict[str, Any]]:
    """A folder's records, in the order of the runs."""
    numbers = sorted(
        int(number)
        for file in folder.glob("run=*.json")
        if (number := file.stem.removeprefix("run=")).isdigit()  # no failure
    )
    return [json.loads((folder / f"run={n}.json").read_text()) for n in numbers]


def _write(file: Path, content: Any) -> None:
    """Write a file as a whole: the sweep may be stopped at any moment."""
    temporary = file.with_suffix(".part")
    provenance.write_json(temporary, content)
    temporary.replace(file)

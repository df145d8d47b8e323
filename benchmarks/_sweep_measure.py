"""The measuring of a load sweep: servers up, warmed up, and one point after another."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
from pathlib import Path
from typing import Any

import _bench_common as common
import _sweep_amounts as sweep_amounts
import _sweep_fleet as sweep_fleet
import _sweep_grid as sweep_grid
import _sweep_prompts as sweep_prompts
import _sweep_slo as slo
import _sweep_summary as sweep_summary
from _sweep_arms import Arm
from _sweep_client import Client
from _sweep_fleet import Fleet
from _sweep_grid import Load, Point, Results
from _sweep_progress import Progress
from _sweep_prompts import Prompt, Prompts
from _sweep_texts import Texts

# Cores that an idle server may use before the user is told.
IDLE_CORES = 0.05
# Clients of the warm-up where no closed loop is measured.
WARM_UP = (1, 4, 16)


class Sweep:
    """A sweep that is being measured.

    Args:
        args: as parsed and checked.
        arms: by name, in the user's order.
        results: where everything is kept.
        settings: kept in the results; "num_prompts" where already known.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        arms: dict[str, Arm],
        results: Results,
        settings: dict[str, Any],
    ) -> None:
        self.args, self.arms = args, arms
        self.results, self.settings = results, settings
        self.client = Client(
            args.target,
            not args.stop_at_eos,
            self._log("client"),
            args.output_spread,
            args.goodput,
        )
        rows = sweep_prompts.load(args, self.client.tokenizer, args.max_prompt_tokens)
        self.prompts = Prompts(rows, args.seed, args.mix)
        self.points = self._points()
        settings["kv_gib_each"] = args.kv_gib or self._kv_gib(rows)
        self.fleet = Fleet(
            args.target,
            sweep_fleet.shared_arguments(args),
            settings["kv_gib_each"],
            results.folder / "logs",
        )
        self.texts = Texts(results.folder, args.resume)
        self.left_out: dict[str, str] = {}
        self.idle: dict[str, float] = {}
        # Output tokens/s by arm and load.
        self.speeds: dict[tuple[str, str], float] = {}
        self.progress = Progress(self._expected)
        self.provenance = common.provenance.collect()

    def _log(self, name: str) -> Path:
        folder = self.results.folder / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.log"

    def _points(self) -> list[Point]:
        args = self.args
        datasets = args.datasets or self.prompts.domains
        for dataset in datasets:
            self.prompts.take(0, 1, dataset)  # an unknown one is an error now
        split = itertools.product(args.split_arms, datasets, args.split_datasets)
        return sweep_grid.points(
            list(self.arms),
            args.concurrency,
            args.rounds,
            list(split),
            args.one_at_a_time,
            args.request_rate,
        )

    def _kv_gib(self, rows: list[Prompt]) -> float:
        """Cache in which the requests of the largest load find room."""
        args = self.args
        if all(arm.url for arm in self.arms.values()):
            return 0.0  # no server of ours
        # On average an answer is half done: the other half is for chance. And half of a
        # last block is empty; vLLM's are of 128 tokens on a CPU.
        prompt = statistics.fmean(row.tokens for row in rows)
        each = prompt + args.output_tokens + 64
        tokens = max(2 * args.max_model_len, round(args.max_num_seqs * each))
        folders = [args.target, *([args.drafter] if args.drafter else [])]
        return sweep_fleet.kv_gib(folders, tokens, 4 if args.dtype == "float32" else 2)

    # ---- the order of things ----

    def run(self) -> None:
        """Measure every point that is not there yet."""
        with self.fleet, self.progress:
            groups = itertools.groupby(self.points, self._together)
            for _, group in groups:
                missing = [p for p in group if not self.results.has(p)]
                if missing:
                    self._measure_all(missing)
                    self.fleet.stop()

    def _together(self, point: Point) -> object:
        """Points of one key are measured with the same running servers."""
        return (point.run, point.arm) if self.args.one_at_a_time else None

    def _measure_all(self, points: list[Point]) -> None:
        names = [n for n in self.arms if n in {p.arm for p in points}]
        self._start([n for n in names if n not in self.left_out])
        self._warm_up()
        self._ask_texts()
        self._choose_counts()
        if "num_prompts" not in self.settings:
            return  # no server got through its warm-up
        self._check_idle()
        coming = [p for p in self.points if not self.results.has(p)]
        self.progress.begin(p for p in coming if p.arm not in self.left_out)
        for point in points:
            if point.arm in self.fleet.servers:
                self._measure(point)

    def _start(self, names: list[str]) -> None:
        for i, name in enumerate(names):
            try:
                with self.progress.waiting(f"starting {name}") as show:
                    seconds = self.fleet.start(self.arms[name], show)
            except ValueError as error:
                self._leave_out(name, str(error))
                continue
            if name not in self.fleet.own():
                self.progress.say(f"{name}: found at {self.arms[name].url}")
                continue
            size = sweep_fleet.own_gib(self.fleet.own()[name])
            self.progress.say(f"{name}: ready after {seconds:.0f} s, {size:.1f} GiB")
            if len(self.fleet.own()) == 1:
                more = sum(1 for n in names[i + 1 :] if not self.arms[n].url)
                sweep_fleet.check_memory(size, sweep_fleet.available_gib(), more)
        if not self.fleet.servers and not self.args.one_at_a_time:
            raise ValueError("no server started; the reasons are above")

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        self.progress.say(f"{name} is left out: {why}")
        self._write()

    # ---- warming up ----

    def _warm_up(self) -> None:
        for clients in self.args.concurrency or WARM_UP:
            load = Load(clients)
            # From the far end, where the measured points do not get to.
            prompts = self.prompts.take(10_000, max(clients, 2))
            for name, server in list(self.fleet.servers.items()):
                with self.progress.waiting(f"warming up {name} with {clients} clients"):
                    try:
                        record = self.client.point(
                            server, prompts, load, self.args.warmup_tokens
                        )
                    except (ValueError, OSError) as error:
                        self._drop(name, f"warm-up with {clients} clients: {error}")
                        continue
                self.speeds[name, str(clients)] = record["output_throughput"]

    def _ask_texts(self) -> None:
        """Let every server answer some prompts alone, to compare their texts."""
        if not self.args.check_texts:
            return
        prompts = self.prompts.take(20_000, self.args.check_texts)
        for name, server in self.fleet.servers.items():
            if self.texts.missing(name):
                with self.progress.waiting(f"asking {name} for texts to compare"):
                    self.texts.ask(name, server, prompts)

    def _choose_counts(self) -> None:
        """Fix the number of prompts at each load, once for the whole sweep."""
        if "num_prompts" in self.settings or not self.speeds:
            return
        self.settings["num_prompts"] = sweep_amounts.choose(self.args, self._slowest)
        self.results.keep_counts(self.settings)

    def _slowest(self, clients: int) -> float:
        """Output tokens/s of the slowest arm at a load, or the nearest warmed up."""
        loads = [int(load) for _, load in self.speeds if load.isdigit()]
        near = str(min(loads, key=lambda c: abs(c - clients)))
        return min(speed for (_, load), speed in self.speeds.items() if load == near)

    def _check_idle(self) -> None:
        if len(self.fleet.own()) < 2:
            return
        with self.progress.waiting("checking that idle servers are idle"):
            self.idle = sweep_fleet.idle_load(self.fleet.own())
        for name, cores in self.idle.items():
            if cores > IDLE_CORES:
                self.progress.say(
                    f"{name} keeps {cores:.2f} cores busy although idle: it slows "
                    "the other arms; --one-at-a-time avoids that"
                )

    # ---- measuring ----

    def _measure(self, point: Point) -> None:
        count = self.settings["num_prompts"][point.load]
        prompts = self.prompts.take(point.run * count, count, point.dataset)
        if point.rate is None:
            load = Load(point.concurrency)
        else:
            seed = self.args.seed + point.run
            load = Load(None, point.rate, self.args.burstiness, seed)
        self.progress.now(point)
        try:
            with self._others_halted(point.arm) as server:
                record = self.client.point(
                    server, prompts, load, self.args.output_tokens
                )
        except (ValueError, OSError) as error:
            self.results.add_failure(point, str(error))
            self._drop(point.arm, str(error))
            return
        record["num_prompts"] = count
        record["burstiness"] = load.burstiness
        record["session"] = self.provenance["time_utc"]
        self.results.add(point, record)
        if point.rate is None:
            self.speeds[point.arm, point.load] = record["output_throughput"]
        self.progress.done(point, record)
        self._write()

    def _others_halted(
        self, arm: str
    ) -> contextlib.AbstractContextManager[sweep_fleet.Endpoint]:
        if self.args.suspend:
            return self.fleet.alone(arm)
        return contextlib.nullcontext(self.fleet.servers[arm])

    def _drop(self, name: str, why: str) -> None:
        """Leave an arm out if its server has died; a failed request alone does not."""
        try:
            self.fleet.servers[name].check_alive()
        except ValueError as error:
            del self.fleet.servers[name]
            self._leave_out(name, str(error))
        else:
            self.progress.say(f"{name}: {why}")

    def _expected(self, point: Point) -> float:
        """Seconds that a point should take."""
        count = self.settings.get("num_prompts", {}).get(point.load, 0)
        if point.rate is not None:
            return float(count / point.rate)
        known = self.speeds.get((point.arm, point.load))
        if known is None and self.speeds:
            known = self._slowest(point.concurrency)
        return count * self.args.output_tokens / known if known else 0.0

    # ---- what it gave ----

    def result(self) -> dict[str, Any]:
        """Everything in result.json."""
        records = {top: self.results.records(top) for top in sweep_grid.TOPS}
        return {
            "settings": self.settings,
            **sweep_summary.summarise(records, self._levels()),
            "left_out": self.left_out,
            "idle_cores": self.idle,
            "provenance": self.provenance,
        }

    def _levels(self) -> dict[str, list[float]]:
        """The service levels that were typed."""
        typed = {
            slo.SPEED[0]: self.args.slo_speed,
            slo.TTFT[0]: self.args.slo_ttft,
        }
        return {key: levels for key, levels in typed.items() if levels}

    def _write(self) -> None:
        self.results.write("result.json", self.result())

"""Throughput and latency under load: DSpark, ngram and no speculation, by concurrency.

    python benchmarks/serve_sweep.py --target T --drafter D --prompts eval.jsonl \
        --out sweep --quick
    python benchmarks/serve_sweep.py --target T --drafter D --prompts eval.jsonl \
        --out sweep --split-datasets 1 16
    vllm bench sweep plot sweep/mixed --curve-by arm --var-x max_concurrency \
        --var-y output_throughput

Every arm has its own `vllm serve`; all are up at once, and idle but for the one that is
measured (the sweep checks that idle servers use no processor). At each load the arms
take turns, another one first each time, so that a change of the machine's speed hits
all alike; the whole grid is measured --rounds times. A ratio is that of two arms in the
same round, then the median over rounds. Where memory does not hold all servers,
--one-at-a-time starts each arm's server anew in each round.

The load is a closed loop of vLLM's own benchmark client: C clients, each with one
streamed greedy chat request at a time. Every arm gets the same prompts in the same
order and has to answer each with a given number of tokens (ignore_eos), so that all do
equal work: --output-tokens on average, spread evenly over half to one and a half of it
(--output-spread), or an arm without speculation would answer in lockstep as no server
does; --stop-at-eos lets answers end where they end. Prompts are JSONL rows
{"dataset", "messages"}; the datasets take turns in a fixed shuffled order, and each
round goes on where the one before it stopped. Prefix caching is off.

Before the first measured point each arm answers short requests (--warmup-tokens) at
each concurrency, from few clients to many; an adaptive arm starts to learn there. Their
speed also says how many prompts make a point of --seconds-per-point seconds: as many as
the slowest arm answers in that time, the same number for all arms, in whole waves of C
and at least two waves.

Arms: none, ngram, dspark-fixed-1, -3 and -7 (that many drafts, all verified),
dspark-threshold, dspark-no-bypass, dspark-adaptive (the defaults; no number of drafts
set by hand), or any other:
    --arm my-arm='{"speculative_config": {...}, "additional_config": {"dspark": {...}}}'
An arm whose server does not start or dies is reported and left out.

--out holds mixed/SERVE--arm=A-BENCH--max_concurrency=C/{run=N,summary}.json, the layout
and keys of `vllm bench sweep serve` (its plot command needs seaborn), by-dataset/ with
the points of --split-datasets, logs/, result.json with our figures and provenance, and
pareto.png, throughput.png and lengths.png. All is written after each point: Ctrl-C
leaves what was measured, and --resume goes on from there; arms that were measured
before and after such a break in the same round give no ratio for it.

Figures: verify_length and draft_length are drafts verified and made per request and
decoding step, steps without drafts included, tau the tokens of such a step;
tok_s_per_user is 1 / TPOT (median over requests).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _bench_common as common
import _sweep_fleet as sweep_fleet
import _sweep_grid as sweep_grid
import _sweep_plots as sweep_plots
import _sweep_report as sweep_report
import _sweep_summary as sweep_summary
from _sweep_arms import Arm
from _sweep_client import Client
from _sweep_fleet import Fleet
from _sweep_grid import Point, Results
from _sweep_options import chosen_arms, parse, settings_of
from _sweep_progress import Progress
from _sweep_prompts import Prompt, Prompts, load_prompts

from vllm_dspark.cli.server import Server
from vllm_dspark.cli.signals import interrupt

# Cores that an idle server may use before the user is told.
IDLE_CORES = 0.05


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
            args.target, not args.stop_at_eos, self._log("client"), args.output_spread
        )
        rows = load_prompts(args.prompts, self.client.tokenizer, args.max_prompt_tokens)
        self.prompts = Prompts(rows, args.seed)
        datasets = args.datasets or self.prompts.domains
        for dataset in datasets:
            self.prompts.take(0, 1, dataset)  # an unknown one is an error now
        split = itertools.product(args.split_arms, datasets, args.split_datasets)
        self.points = sweep_grid.points(
            list(arms), args.concurrency, args.rounds, list(split), args.one_at_a_time
        )
        settings["kv_gib_each"] = args.kv_gib or self._kv_gib(rows)
        self.fleet = Fleet(
            args.target,
            sweep_fleet.shared_arguments(args),
            settings["kv_gib_each"],
            results.folder / "logs",
        )
        self.left_out: dict[str, str] = {}
        self.idle: dict[str, float] = {}
        self.speeds: dict[tuple[str, int], float] = {}
        self.progress = Progress(self._expected)
        self.provenance = common.provenance.collect()

    def _log(self, name: str) -> Path:
        folder = self.results.folder / "logs"
        folder.mkdir(exist_ok=True)
        return folder / f"{name}.log"

    def _kv_gib(self, rows: list[Prompt]) -> float:
        """Cache in which the requests of the largest load find room."""
        args = self.args
        clients = max([*args.concurrency, *args.split_datasets])
        # On average an answer is half done; blocks that are not full are no more.
        each = statistics.fmean(row.tokens for row in rows) + args.output_tokens
        tokens = max(args.max_model_len, round(clients * each))
        return sweep_fleet.kv_gib([args.target, args.drafter], tokens)

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
        self._choose_counts()
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
            size = sweep_fleet.own_gib(self.fleet.servers[name])
            self.progress.say(f"{name}: ready after {seconds:.0f} s, {size:.1f} GiB")
            if len(self.fleet.servers) == 1:
                more = len(names) - i - 1
                sweep_fleet.check_memory(size, sweep_fleet.available_gib(), more)
        if not self.fleet.servers and not self.args.one_at_a_time:
            raise ValueError("no server started; the reasons are above")

    def _leave_out(self, name: str, why: str) -> None:
        self.left_out[name] = why
        self.progress.say(f"{name} is left out: {why}")
        self._write()

    # ---- warming up ----

    def _warm_up(self) -> None:
        for load in self.args.concurrency:
            # From the far end, where the measured points do not get to.
            prompts = self.prompts.take(10_000, max(load, 2))
            for name, server in list(self.fleet.servers.items()):
                with self.progress.waiting(f"warming up {name} with {load} clients"):
                    try:
                        record = self.client.point(
                            server, prompts, load, self.args.warmup_tokens
                        )
                    except (ValueError, OSError) as error:
                        self._drop(name, f"warm-up with {load} clients: {error}")
                        continue
                self.speeds[name, load] = record["output_throughput"]

    def _choose_counts(self) -> None:
        """Fix the number of prompts at each load, once for the whole sweep."""
        if "num_prompts" in self.settings or not self.speeds:
            return
        args = self.args
        loads = sorted({*args.concurrency, *args.split_datasets})
        if args.rounds_per_client is not None:
            per_client = args.rounds_per_client
            counts = {
                c: sweep_grid.num_prompts(c, per_client, args.min_prompts)
                for c in loads
            }
        else:
            rates = {c: self._slowest(c) / args.output_tokens for c in loads}
            counts = sweep_grid.estimated_counts(
                rates, args.seconds_per_point, args.min_prompts
            )
        self.settings["num_prompts"] = {str(c): n for c, n in counts.items()}
        self.results.keep_counts(self.settings)

    def _slowest(self, load: int) -> float:
        """Output tokens/s of the slowest arm at a load, or the nearest warmed up."""
        near = min((c for _, c in self.speeds), key=lambda c: abs(c - load))
        return min(speed for (_, c), speed in self.speeds.items() if c == near)

    def _check_idle(self) -> None:
        if len(self.fleet.servers) < 2:
            return
        with self.progress.waiting("checking that idle servers are idle"):
            self.idle = sweep_fleet.idle_load(self.fleet.servers)
        for name, cores in self.idle.items():
            if cores > IDLE_CORES:
                self.progress.say(
                    f"{name} keeps {cores:.2f} cores busy although idle: it slows "
                    "the other arms; --one-at-a-time avoids that"
                )

    # ---- measuring ----

    def _measure(self, point: Point) -> None:
        count = self.settings["num_prompts"][str(point.concurrency)]
        prompts = self.prompts.take(point.run * count, count, point.dataset)
        self.progress.now(point)
        try:
            with self._others_halted(point.arm) as server:
                record = self.client.point(
                    server, prompts, point.concurrency, self.args.output_tokens
                )
        except (ValueError, OSError) as error:
            self.results.add_failure(point, str(error))
            self._drop(point.arm, str(error))
            return
        record["num_prompts"] = count
        record["session"] = self.provenance["time_utc"]
        self.results.add(point, record)
        self.speeds[point.arm, point.concurrency] = record["output_throughput"]
        self.progress.done(point, record)
        self._write()

    def _others_halted(self, arm: str) -> contextlib.AbstractContextManager[Server]:
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
        counts = self.settings.get("num_prompts", {})
        tokens = counts.get(str(point.concurrency), 0) * self.args.output_tokens
        known = self.speeds.get((point.arm, point.concurrency))
        if known is None and self.speeds:
            known = self._slowest(point.concurrency)
        return tokens / known if known else 0.0

    # ---- what it gave ----

    def summary(self) -> dict[str, Any]:
        """Everything in result.json."""
        grid = self.results.records(sweep_grid.GRID)
        split = self.results.records(sweep_grid.SPLIT)
        return {
            "settings": self.settings,
            **sweep_summary.summarise(grid, split),
            "left_out": self.left_out,
            "idle_cores": self.idle,
            "provenance": self.provenance,
        }

    def _write(self) -> dict[str, Any]:
        result = self.summary()
        self.results.write("result.json", result)
        return result

    def report(self) -> None:
        """Write the results and show them."""
        result = self._write()
        if not result["arms"]:
            print("nothing was measured")
            return
        sweep_report.show(result)
        for name, why in self.left_out.items():
            print(f"left out: {name}: {why.splitlines()[0]}")
        files = sweep_plots.draw(result, self.results.folder)
        for file in [self.results.folder / "result.json", *files]:
            print(f"written: {file}")


@contextlib.contextmanager
def _stopped() -> Iterator[None]:
    """Ctrl-C ends the measuring, not the report."""
    try:
        yield
    except KeyboardInterrupt:
        print("\nstopped; --resume continues", flush=True)


def main() -> int:
    signal.signal(signal.SIGTERM, interrupt)
    try:
        args = parse(str(__doc__))
        arms = chosen_arms(args)
        results = Results(args.out)
        settings = results.settings(settings_of(args, arms), args.resume)
        sweep = Sweep(args, arms, results, settings)
        with _stopped():
            sweep.run()
        sweep.report()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

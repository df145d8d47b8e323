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

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any

import _sweep_html as sweep_html
import _sweep_plots as sweep_plots
import _sweep_report as sweep_report
from _sweep_grid import Results
from _sweep_measure import Sweep
from _sweep_options import chosen_arms, parse, reference_of, settings_of

from vllm_dspark.cli.signals import interrupt


def report(results: Results, result: dict[str, Any]) -> None:
    """Write the results and show them."""
    results.write("result.json", result)
    for name, why in result["left_out"].items():
        first, *more = why.splitlines()
        causes = [line for line in more if line.startswith("cause: ")]
        print(" | ".join([f"left out: {name}: {first}", *causes]))
    if not result["arms"] and not result["open_loop"]:
        print("nothing was measured")
        return
    sweep_report.show(result)
    files = sweep_plots.draw(result, results.folder)
    files.append(sweep_html.write(result, results.folder))
    for file in [results.folder / "result.json", *files]:
        print(f"written: {file}")


def wrong_texts(result: dict[str, Any]) -> list[str]:
    """Arms whose texts differ from the reference's without an explanation."""
    arms = result.get("texts", {}).get("arms", {})
    return [arm for arm, entry in arms.items() if entry["passed"] is False]


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
        reference = reference_of(args, arms)
        results = Results(args.out)
        settings = results.settings(settings_of(args, arms), args.resume)
        sweep = Sweep(args, arms, results, settings)
        with _stopped():
            sweep.run()
        result = sweep.result()
        if args.check_texts:
            result["texts"] = sweep.texts.judged(args.target, reference)
        report(results, result)
        return 1 if wrong_texts(result) else 0
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())

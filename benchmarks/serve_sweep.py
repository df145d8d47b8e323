"""Throughput and latency under load, by arm: DSpark, vLLM's other methods, none.

    python benchmarks/serve_sweep.py --target T --drafter D --prompts eval.jsonl \
        --out sweep --quick
    python benchmarks/serve_sweep.py --target T --drafter D --prompts eval.jsonl \
        --out sweep --split-datasets 1 16
    vllm bench sweep plot sweep/mixed --curve-by arm --var-x max_concurrency \
        --var-y output_throughput

Every arm has its own `vllm serve`; all are up at once, and idle but for the one that is
measured (the sweep checks that idle servers use no processor; --suspend halts them). At
each load the arms take turns, another one first each time, so that a change of the
machine's speed hits all alike; the whole grid is measured --rounds times. A ratio is
that of two arms in the same round, then the median over rounds. Where memory does not
hold all servers, --one-at-a-time starts each arm's server anew in each round.

The load is that of vLLM's own benchmark client. Closed loop (--concurrency): C clients,
each with one streamed greedy chat request at a time. Open loop (--request-rate):
requests arrive by themselves, at the same moments for every arm. Every arm gets the
same prompts in the same order and has to answer each with a given number of tokens
(ignore_eos), so that all do equal work: --output-tokens on average, spread evenly over
half to one and a half of it (--output-spread), or an arm without speculation would
answer in lockstep as no server does; --stop-at-eos lets answers end where they end.

Prompts are JSONL rows {"dataset", "messages"}, or those of vLLM's own bench
(--vllm-dataset NAME='{"dataset_name": "random", "random_input_len": 200}'). The
datasets take turns in a fixed shuffled order, --mix math=2 chat=1 gives shares, and
each round goes on where the one before it stopped. Prefix caching is off.

Before the first measured point each arm answers short requests (--warmup-tokens) at
each concurrency, from few clients to many; an adaptive arm starts to learn there. Their
speed also says how many prompts make a point of --seconds-per-point seconds: as many as
the slowest arm answers in that time, the same number for all arms, in whole waves of C
and at least two waves. Then each arm answers --check-texts prompts alone: a text that
is not the reference's must part from it at a near-tie of the target, or the exit status
is 1.

Arms: none, ngram, suffix, mtp, dflash, eagle3 and draft_model (the last three with
--draft-model ARM=FOLDER), dspark-fixed (all of the block verified), dspark-fixed-N (N
drafts), dspark-threshold, dspark-no-bypass, dspark-adaptive (no number of drafts set by
hand); `dspark-` may be left out. Or any other, or a server that runs already (with
prefix caching as it has it):
    --arm my-arm='{"speculative_config": {...}, "additional_config": {"dspark": {...}}}'
    --url my-server=http://127.0.0.1:8000
An arm whose server does not start or dies is left out and reported in vLLM's words.

--out holds mixed/SERVE--arm=A-BENCH--max_concurrency=C/{run=N,summary}.json, the layout
and keys of `vllm bench sweep serve` (its plot commands need seaborn), open-loop/ with
the points of --request-rate, by-dataset/ with those of --split-datasets, logs/,
texts.json, result.json with our figures and provenance, report.html (one page, with
everything in it) and its figures as PNG. result.json is written after each point:
Ctrl-C leaves what was measured, and --resume goes on from there; arms that were
measured before and after such a break in the same round give no ratio for it.

Figures: verify_length and draft_length are drafts verified and made per request and
decoding step, steps without drafts included, tau the tokens of such a step;
tok_s_per_user is 1 / TPOT (median over requests). Service levels are read off each
arm's curve over the loads, straight between two loads.
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

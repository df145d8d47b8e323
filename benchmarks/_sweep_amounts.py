"""How many prompts make a point of the load sweep: one number for all arms."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from _sweep_grid import rate_key


def choose(args: argparse.Namespace, slowest: Callable[[int], float]) -> dict[str, int]:
    """Prompts by load, as `Point.load` names it.

    Args:
        slowest: output tokens/s of the slowest arm with so many clients.
    """
    loads = sorted({*args.concurrency, *args.split_datasets})
    if args.rounds_per_client is not None:
        each = args.rounds_per_client
        counts = {c: num_prompts(c, each, args.min_prompts) for c in loads}
    else:
        rates = {c: slowest(c) / args.output_tokens for c in loads}
        seconds = args.seconds_per_point
        counts = estimated_counts(rates, seconds, args.min_prompts)
    found = {str(c): n for c, n in counts.items()}
    for rate in args.request_rate:
        arrivals = round(rate * args.seconds_per_point)
        found[rate_key(rate)] = max(args.min_prompts, arrivals)
    return found


def num_prompts(concurrency: int, per_client: float, least: int) -> int:
    """Prompts of a point: whole waves of all clients, at least two and ``least``."""
    waves = max(2, round(per_client), -(-least // concurrency))
    return waves * concurrency


def estimated_counts(
    rates: dict[int, float], seconds: float, least: int
) -> dict[int, int]:
    """Prompts at each load for points of about ``seconds``.

    Args:
        rates: requests/s at each load, of the slowest arm: one number for all arms.
    """
    return {
        load: num_prompts(load, rate * seconds / load, least)
        for load, rate in rates.items()
    }

"""Who trims drafts on the V2 runner: the name of the scheduler class says it.

All processes of an engine see the same configuration, so they agree.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

_MODULE = "vllm_dspark.integration.v2.scheduler."


class Trims(StrEnum):
    """Where verify lengths come about."""

    DEVICE = "device"  # within the scheduler's budget, by current survivals
    HOST = "host"  # in the scheduler, which waits for the drafts
    NOBODY = "nobody"  # all drafts are verified; how many are made is chosen
    NOT_OURS = "not ours"  # vLLM's scheduler, and its own settings


# By (trims, asynchronous).
SCHEDULERS = {
    (Trims.DEVICE, False): _MODULE + "DSparkV2BudgetScheduler",
    (Trims.DEVICE, True): _MODULE + "DSparkV2AsyncBudgetScheduler",
    (Trims.HOST, False): _MODULE + "DSparkV2TrimmingScheduler",
    (Trims.NOBODY, False): _MODULE + "DSparkV2Scheduler",
    (Trims.NOBODY, True): _MODULE + "DSparkV2AsyncScheduler",
}
_TRIMS = {name: trims for (trims, _), name in SCHEDULERS.items()}


def trims_of(vllm_config: Any) -> Trims:
    """Of an engine with this configuration."""
    scheduler = vllm_config.scheduler_config.scheduler_cls
    return _TRIMS.get(scheduler, Trims.NOT_OURS)

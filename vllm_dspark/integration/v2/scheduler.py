"""The schedulers of the V2 runner: who trims, and whether steps overlap (`trims`)."""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_dspark.integration.trimming import HostTrimming
from vllm_dspark.integration.v2.budgeting import Budgeting, LateReports, Untrimmed


class DSparkV2TrimmingScheduler(HostTrimming, LateReports, Scheduler):
    """Trims drafts itself: where vLLM's device does not, and steps do not overlap."""


class DSparkV2BudgetScheduler(Budgeting, Scheduler):
    """Gives the device budgets."""


class DSparkV2AsyncBudgetScheduler(Budgeting, AsyncScheduler):
    """Gives the device budgets, while the step before is under way."""


class DSparkV2Scheduler(Untrimmed, Scheduler):
    """Chooses draft lengths; nothing is trimmed."""


class DSparkV2AsyncScheduler(Untrimmed, AsyncScheduler):
    """The same, while the step before is under way."""

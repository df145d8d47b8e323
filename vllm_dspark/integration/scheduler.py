"""The scheduler of the V1 runner: vLLM's synchronous one, with the controller."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler

from vllm_dspark.integration.trimming import HostTrimming


class DSparkScheduler(HostTrimming, Scheduler):
    """Trims drafts, and says how many to draft."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.dynamic_sd_lookup is None:
            # Otherwise vLLM gives a request with one token left to compute, such as a
            # prompt of one token that joins others, K drafts of -1, for the sake of
            # CUDA graphs: rows that nobody drafted and nobody can verify.
            # The table is "dynamic K by batch size", which `schedule` decides.
            most = self.scheduler_config.max_num_seqs
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (most + 1)

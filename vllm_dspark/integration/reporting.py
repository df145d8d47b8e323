"""What the workers of both runners add: what steps cost, for the scheduler to know."""

from __future__ import annotations

from typing import Any

from vllm_dspark.integration.config import options
from vllm_dspark.integration.costs import Timer, cost_of
from vllm_dspark.integration.report import CostReport


class CostReporting:
    """To be put before a worker class of vLLM's."""

    _cost: CostReport | None = None

    def _timer(self) -> Timer:
        """Of this worker's runner."""
        raise NotImplementedError

    def compile_or_warm_up_model(self) -> Any:
        """As vLLM does; then what steps cost, if lengths will be chosen by it."""
        times = super().compile_or_warm_up_model()  # type: ignore[misc]
        if self._wants_costs():
            config = self.vllm_config  # type: ignore[attr-defined]
            self._cost = cost_of(config, self._timer())
        return times

    def _wants_costs(self) -> bool:
        config = self.vllm_config  # type: ignore[attr-defined]
        return options(config).policy == "adaptive"

    def take_cost(self) -> CostReport | None:
        """What steps cost, the first time only."""
        cost, self._cost = self._cost, None
        return cost

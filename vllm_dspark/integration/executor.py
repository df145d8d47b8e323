"""vLLM's multiprocess executor with fewer messages a step.

vLLM sends the worker three messages in a step with drafts: run the model, sample, hand
over the drafts. On few cores each waits for a process switch. Our CPU worker samples in
the first one where no grammar has to come in between, and the drafts travel with the
output (`report.take_report`), so nothing is left to ask for.
"""

from __future__ import annotations

from vllm.v1.executor.multiproc_executor import MultiprocExecutor
from vllm.v1.outputs import DraftTokenIds


class DSparkMultiprocExecutor(MultiprocExecutor):
    """MultiprocExecutor that does not ask for drafts: they came with the output."""

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        return None

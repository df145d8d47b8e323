"""Draws sampled texts from engines with our controller on vLLM's V2 runner.

``python -m tests.integration.oracle.v2_sampled FOLDER OUT.pt DRAWS``: a process of its
own, as `v2_run`. FOLDER holds ``target`` and ``drafter``, a pair with few tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.integration.oracle import v2_patches

v2_patches.install()

import torch  # noqa: E402

from tests.integration.engine import KV_BYTES, Engine, engine  # noqa: E402
from vllm_dspark.schedule.cost import CostTable  # noqa: E402
from vllm_dspark.schedule.drafting import Reason  # noqa: E402
from vllm_dspark.schedule.facts import DraftPlan  # noqa: E402

PROMPT, LENGTH, WIDTH = [5, 4], 3, 2
REGEX = r"[!-#]{20}"
ALLOWED = list(range(3, 6))  # the ids of these characters
ROWS = 128  # requests in a step: the interpreter takes its time by step and by row
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": False,
    "max_num_seqs": ROWS,
    "max_num_batched_tokens": ROWS * (WIDTH + 1),
    "max_model_len": 64,
    "kv_cache_memory_bytes": KV_BYTES,
    "structured_outputs_config": {"backend": "xgrammar"},
    "additional_config": {"dspark": {"policy": "adaptive", "cost_table": ""}},
}
SAMPLED = {"draft_sample_method": "probabilistic"}


def jagged(tokens: int) -> float:
    """Seconds of a step: a jump every 16 tokens."""
    return 0.1 + 0.03 * (tokens // 16)


def table() -> CostTable:
    tokens = tuple(range(1, ROWS * (WIDTH + 1) + 1))
    free = ((1e-6, 1e-6), (1e-6, 1e-6))
    return CostTable(
        tokens, tuple(map(jagged, tokens)), 0.0, (1, ROWS), (0, WIDTH), free
    )


def draw(eng: Engine, n: int, grammar: bool = False) -> dict[str, Any]:
    """So many texts, each with a seed; what was trimmed."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    scheduler = eng.scheduler
    controller = scheduler.controller = scheduler._build()
    controller.price(table())
    controller.timed = lambda *args: None
    controller.draft = lambda batch: DraftPlan(WIDTH, Reason.PAYS)
    scheduler.draft_confidences = {}
    before = eng.stats()
    form = StructuredOutputsParams(regex=REGEX) if grammar else None
    params = [
        SamplingParams(
            max_tokens=LENGTH + 1,
            ignore_eos=not grammar,
            detokenize=False,
            seed=seed,
            structured_outputs=form,
        )
        for seed in range(n)
    ]
    texts = eng.tokens([PROMPT] * n, params)
    after, totals = eng.stats(), controller.totals
    return {
        "draws": [tuple(text[:LENGTH]) for text in texts],
        "verify_lens": dict(totals.verify_lens),
        "trimmed": totals.trimmed,
        "verified": totals.verified,
        "accepted": after.accepted - before.accepted,
        "scheduler": type(scheduler).__name__,
        "steps": totals.steps,
    }


def trim_by_token(eng: Engine) -> None:
    """What no trimming may do: a draft is verified or not by what it is."""
    scheduler = eng.scheduler
    decide = scheduler._decide

    def biased(requests: Sequence[Any], *rest: Any) -> Any:
        for request in requests:
            drafts = request.spec_token_ids
            odd = [k for k, token in enumerate(drafts) if token % 2]
            request.spec_token_ids = drafts[: odd[0] if odd else len(drafts)]
        return decide(requests, *rest)

    scheduler._decide = biased


def main() -> None:
    folder, out = map(Path, sys.argv[1:3])
    draws = int(sys.argv[3])
    pair = (folder / "target", folder / "drafter")
    SETTINGS["additional_config"]["dspark"]["cost_table"] = str(folder / "cost.json")
    v2_patches.top_k_top_p_in_torch()
    with engine(*pair, spec=SAMPLED, **SETTINGS) as eng:
        result = {"host": draw(eng, draws), "host grammar": draw(eng, draws, True)}
        trim_by_token(eng)
        result["biased"] = draw(eng, draws)
    v2_patches.trim_on_device()
    v2_patches.overlap_steps()
    spec = {**SAMPLED, "enable_adaptive_verification": True}
    with engine(*pair, spec=spec, async_scheduling=True, **SETTINGS) as eng:
        result["device"] = draw(eng, draws)
        result["device grammar"] = draw(eng, draws, True)
    torch.save(result, out)


if __name__ == "__main__":
    main()

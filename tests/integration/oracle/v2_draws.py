"""Draws many short texts on vLLM's V2 runner, with drafts that are trimmed.

``python -m tests.integration.oracle.v2_draws FOLDER OUT.json``: a process of its own,
as `v2_run`. FOLDER holds the target, the drafter and made-up costs, by which some
drafts are verified and some trimmed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.integration.oracle import v2_patches

v2_patches.install()

from tests.integration.engine import Engine, engine  # noqa: E402
from tests.integration.oracle.sizes import DRAWS, LENGTH, NUMBER, PROMPT  # noqa: E402
from tests.integration.oracle.v2_scenes import SAMPLED  # noqa: E402

SIZES = {
    "max_num_seqs": 64,
    "max_num_batched_tokens": 512,
    "max_model_len": 64,
    "block_size": 32,
}


def draws(eng: Engine) -> dict[str, Any]:
    """Texts by setting, neighbours in a batch from different ones; what was trimmed."""
    from vllm import SamplingParams

    controller = eng.scheduler.controller
    controller.timed = lambda *args: None
    params = [
        SamplingParams(max_tokens=LENGTH + 1, ignore_eos=True, detokenize=False, **s)
        for s in DRAWS.values()
    ]
    prompts = [PROMPT] * (NUMBER * len(params))
    texts = eng.tokens(prompts, params * NUMBER)
    stats, totals = eng.stats(), controller.totals
    return {
        "texts": {
            name: [text[:LENGTH] for text in texts[i :: len(params)]]
            for i, name in enumerate(DRAWS)
        },
        "trimmed": totals.trimmed,
        "verified": totals.verified,
        "lengths": len(totals.verify_lens),
        "accepted": stats.accepted,
        "scheduler": type(eng.scheduler).__name__,
    }


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    v2_patches.top_k_top_p_in_torch()
    pair = (folder / "target", folder / "drafter")
    table = str(folder / "cost.json")
    ours = {"policy": "adaptive", "bypass": False, "cost_table": table}
    config = {"dspark": ours}
    keys: dict[str, Any] = {"additional_config": config, **SIZES}
    found = {}
    with engine(*pair, spec=SAMPLED, **keys) as eng:
        found["host"] = draws(eng)
    v2_patches.trim_on_device()
    v2_patches.overlap_steps()
    spec = {**SAMPLED, "enable_adaptive_verification": True}
    with engine(*pair, spec=spec, async_scheduling=True, **keys) as eng:
        found["device"] = draws(eng)
    out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

"""`rejection_kernel: dspark` and vLLM's own kernels give the same texts.

Both run in vLLM's V2 runner under Triton's interpreter, one engine each for every job:

- greedy and sampled requests with seeds in one batch, with top-k, top-p and min-p,
  prompts in parts and prefix hits;
- drafts that are sampled and drafts that are not, both methods of verification;
- structured output, whose drafts leave the grammar.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.integration.recorder import prompt
from tests.integration.test_oracle_v2 import SETTINGS, VOCAB, same_key_norms, waves
from tests.integration.test_structured_output import GRAMMARS
from tests.integration.test_structured_output import SETTINGS as GRAMMAR_SETTINGS
from tests.integration.test_v2_adapter import run_jobs
from tests.tiny import make_tiny_drafter, make_tiny_target

pytestmark = [pytest.mark.slow, pytest.mark.v2]

KERNELS = {
    "vllm": "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
    "dspark": "vllm_dspark.integration.v2.sampler",
}
CUTS = ({}, {"top_k": 20}, {"top_p": 0.7}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02})


def both(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The job with each kernel."""
    return [
        {
            **job,
            "settings": {
                **job["settings"],
                "additional_config": {"dspark": {"rejection_kernel": kernel}},
            },
        }
        for kernel in KERNELS
    ]


def same(results: list[dict[str, Any]]) -> None:
    """Pairs of results: each kernel ran, and the texts are the same."""
    for theirs, ours in zip(results[::2], results[1::2], strict=True):
        assert theirs["rejection_sampler"] == KERNELS["vllm"]
        assert ours["rejection_sampler"] == KERNELS["dspark"]
        assert ours["verifications"] > 5
        assert ours["accepted"] == theirs["accepted"] > 0
        assert [t["tokens"] for t in ours["texts"]] == [
            t["tokens"] for t in theirs["texts"]
        ]


def test_the_same_texts(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    target = make_tiny_target(tmp_path / "llama", vocab_size=VOCAB)
    drafter = same_key_norms(make_tiny_drafter(tmp_path / "drafter", target))
    jobs = []
    for drafts, method in (
        ("probabilistic", "standard"),
        ("probabilistic", "block"),
        ("greedy", "block"),
    ):
        rows = waves((0.6, 1.2, 0.0, 0.9), 8)
        for wave in rows:
            for row, cut in zip(wave, CUTS[1:], strict=False):
                row["params"].update(cut)
        job = {
            "target": str(target),
            "drafter": str(drafter),
            "spec": {"draft_sample_method": drafts, "rejection_sample_method": method},
            "settings": SETTINGS,
            "waves": rows,
        }
        jobs += both(job)
    same(run_jobs(tmp_path, "texts", jobs, plugin=True))


def test_the_same_structured_output(
    tmp_path: Path, text_pair: tuple[Path, Path]
) -> None:
    pytest.importorskip("triton", reason="vLLM's V2 runner is interpreted with Triton")
    wave = [
        {
            "prompt": prompt(5 + 3 * i, i),
            "params": {"temperature": 0.7 * (i > 0), "max_tokens": 10, "seed": i},
            "grammar": GRAMMARS[name][0],
        }
        for i, name in enumerate(GRAMMARS)
    ]
    wave.append({"prompt": prompt(9, 9), "params": {"max_tokens": 10, "seed": 9}})
    target, drafter = text_pair
    job = {
        "target": str(target),
        "drafter": str(same_key_norms(drafter)),
        "spec": {"draft_sample_method": "probabilistic"},
        "settings": {**SETTINGS, **GRAMMAR_SETTINGS},
        "waves": [wave],
    }
    same(run_jobs(tmp_path, "grammar", both(job), plugin=True))

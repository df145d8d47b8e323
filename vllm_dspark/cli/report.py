"""The demo's figures for machines: the JSON that ``--json FILE`` writes."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from vllm_dspark.cli.arms import Arm
from vllm_dspark.cli.near_tie import Difference


def as_json(
    arms: dict[str, Arm], found: list[Difference], prompts: Mapping[str, str]
) -> dict[str, Any]:
    """The figures under the names machines expect; ``ratio`` is by geometric mean."""
    fast, plain = arms.values()
    counts = fast.speculation
    return {
        "ratio": fast.tokens_per_second / plain.tokens_per_second,
        "tau": counts.accepted_length if counts else None,
        "acceptance_per_position": counts.acceptance_per_position if counts else [],
        "texts_equal": not found,
        "first_difference_gap": max((d.gap_float32 for d in found), default=None),
        "differences": [asdict(d) for d in found],
        "tok_s": {arm.name: arm.tokens_per_second for arm in arms.values()},
        "tok_s_per_prompt": {
            arm.name: {n: a.tokens_per_second for n, a in arm.answers.items()}
            for arm in arms.values()
        },
        "seconds": {
            arm.name: {n: a.seconds for n, a in arm.answers.items()}
            for arm in arms.values()
        },
        "start_seconds": {arm.name: arm.start_seconds for arm in arms.values()},
        "prompts": dict(prompts),
        "texts": {
            arm.name: {n: a.text for n, a in arm.answers.items()}
            for arm in arms.values()
        },
    }

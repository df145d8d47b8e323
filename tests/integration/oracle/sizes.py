"""What `v2_draws` draws at what costs, for those who import no V2 runner of vLLM's."""

from __future__ import annotations

from typing import Any

VOCAB = 8
PROMPT = [5, 3]
LENGTH = 3
NUMBER = 160  # texts of each setting
DRAWS: dict[str, dict[str, Any]] = {
    "warm": {"temperature": 1.3},
    "top_k": {"temperature": 1.2, "top_k": 3},
}


def stairs(tokens: int) -> float:
    """Likely drafts are worth their step, the others are not."""
    return 0.1 + 0.004 * (tokens // 64)

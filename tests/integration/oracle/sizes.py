"""What `v2_draws` draws, for those who must not import vllm's V2 runner."""

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

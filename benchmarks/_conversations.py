"""Answers of arms to the same growing conversations, summed up by context."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _paired_turns import Turn, paired

SHORTEST = 512  # tokens of context, the first bucket's end


@dataclass(frozen=True)
class Exchange:
    """One question of a conversation, answered by every arm in turn.

    Args:
        conversation: its number.
        turn: of the conversation, from 0.
        context: tokens before the answer.
        answers: by arm; an answer's first token, the prompt's, is not in it.
        same: arms whose answer is the reference's.
    """

    conversation: int
    turn: int
    context: int
    answers: dict[str, Turn]
    same: list[str]


def bucket(context: int) -> int:
    """The end of a context's bucket: SHORTEST, twice that, and so on."""
    end = SHORTEST
    while context >= end:
        end *= 2
    return end


def by_context(exchanges: Sequence[Exchange]) -> dict[int, dict[str, Any]]:
    """Figures by arm for each bucket; the first arm is the reference.

    ``tau`` is tokens per step, steps without drafts included, ``acceptance`` the share
    of verified drafts that were accepted, ``ratio`` the median over the answers of
    tokens/s against the reference's answer to the same question, with a 95% interval.
    """
    buckets: dict[int, list[Exchange]] = defaultdict(list)
    for exchange in exchanges:
        buckets[bucket(exchange.context)].append(exchange)
    return {end: _figures(buckets[end]) for end in sorted(buckets)}


def _figures(exchanges: list[Exchange]) -> dict[str, Any]:
    names = list(exchanges[0].answers)
    reference = [e.answers[names[0]] for e in exchanges]
    found = {}
    for name in names:
        answers = [e.answers[name] for e in exchanges]
        tokens = sum(a.tokens for a in answers)
        steps = sum(a.steps for a in answers)
        verified = sum(a.verified for a in answers)
        found[name] = {
            "answers": len(answers),
            "same_text": sum(name in e.same for e in exchanges),
            "tau": tokens / steps,
            "acceptance": (tokens - steps) / verified if verified else None,
            "draft_length": sum(a.drafted for a in answers) / steps,
            "verify_length": verified / steps,
            "tokens_per_second": tokens / sum(a.seconds for a in answers),
            "ratio": paired(answers, reference, 0.0),
        }
    return found

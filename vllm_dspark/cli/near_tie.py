"""Are two answers of the same model equal, and if not, was it a near-tie?

In bfloat16 a target's logits are rounded to 8 bits, and verification computes them
in batches of another shape than plain decoding does, so two almost equal candidates
may swap. Then everything after differs. `logit_gaps` asks the target itself how far
apart the two candidates are at the first difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_dspark.cli.arms import Answer


@dataclass(frozen=True, slots=True)
class Difference:
    """The first position where two answers differ, and the target's opinion."""

    prompt: str
    position: int
    tokens: tuple[int, int]
    texts: tuple[str, str]
    # Absolute difference of the two candidates' logits.
    gap_float32: float
    gap_bfloat16: float
    # Place of the two candidates among all logits in float32 (0 is the largest).
    ranks: tuple[int, int]


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Index of the first token that differs, or None if the two are equal."""
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return None if len(one) == len(other) else min(len(one), len(other))


def differences(
    target: Path, one: dict[str, Answer], other: dict[str, Answer]
) -> list[Difference]:
    """First differences of all prompts, judged with the target in transformers."""
    places = {
        name: index
        for name in one
        if (index := first_difference(one[name].token_ids, other[name].token_ids))
        is not None
    }
    if not places:
        return []
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    rows = {}
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)  # bfloat16 weights: going up and back loses nothing
        for name, index in places.items():
            prefix = one[name].prompt_ids + one[name].token_ids[:index]
            with torch.inference_mode():
                logits = model(torch.tensor([prefix]), logits_to_keep=1).logits
            rows[name, dtype] = logits[0, -1].float()
    found = []
    for name, index in places.items():
        # An answer that is a prefix of the other ended: its token is the end token.
        pair = tuple(
            ids[index] if index < len(ids) else int(tokenizer.eos_token_id)
            for ids in (one[name].token_ids, other[name].token_ids)
        )
        a, b = pair
        exact, rounded = rows[name, torch.float32], rows[name, torch.bfloat16]
        found.append(
            Difference(
                prompt=name,
                position=index,
                tokens=(a, b),
                texts=(tokenizer.decode([a]), tokenizer.decode([b])),
                gap_float32=float((exact[a] - exact[b]).abs()),
                gap_bfloat16=float((rounded[a] - rounded[b]).abs()),
                ranks=(int((exact > exact[a]).sum()), int((exact > exact[b]).sum())),
            )
        )
    return found

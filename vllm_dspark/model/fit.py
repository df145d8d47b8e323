"""Whether a drafter belongs to a target, from their configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_dspark.config import DrafterConfig


@dataclass(frozen=True, slots=True)
class TargetFacts:
    """The target's dimensions that a drafter depends on."""

    hidden_size: int
    vocab_size: int
    num_hidden_layers: int

    @classmethod
    def from_hf_config(cls, raw: Mapping[str, Any]) -> TargetFacts:
        """Read them from a target's ``config.json`` (``text_config`` if nested).

        Raises:
            ValueError: a dimension is missing.
        """
        text = raw.get("text_config") or raw
        names = ("hidden_size", "vocab_size", "num_hidden_layers")
        for name in names:
            if not isinstance(text.get(name), int):
                raise ValueError(
                    f"target config: {name!r} is {text.get(name)!r}; a text model's "
                    "config.json has an integer there"
                )
        return cls(*(text[name] for name in names))


def check_fit(drafter: DrafterConfig, target: TargetFacts | Mapping[str, Any]) -> None:
    """Refuse a drafter that was made for another target.

    Args:
        drafter: the drafter's configuration.
        target: facts, or the target's ``config.json`` object.

    Raises:
        ValueError: naming the first dimension that differs, with both numbers.
    """
    if not isinstance(target, TargetFacts):
        target = TargetFacts.from_hf_config(target)
    pairs = (
        ("hidden_size", drafter.hidden_size, target.hidden_size),
        ("vocab_size", drafter.vocab_size, target.vocab_size),
        ("number of layers", drafter.num_target_layers, target.num_hidden_layers),
    )
    for name, of_drafter, of_target in pairs:
        if of_drafter is not None and of_drafter != of_target:
            raise ValueError(
                f"this drafter is for another target: its target's {name} is "
                f"{of_drafter}, but the target given has {of_target}"
            )
    last = target.num_hidden_layers - 1
    if max(drafter.target_layer_ids) > last:
        raise ValueError(
            "this drafter is for another target: it reads layer "
            f"{max(drafter.target_layer_ids)}, but the target given ends with {last}"
        )
    if last in drafter.target_layer_ids:
        # Hugging Face's last hidden state is taken after the final norm, vLLM's before
        # it: whichever the drafter was trained on, the other one drafts badly.
        raise ValueError(
            f"the drafter reads the target's last layer ({last}), whose output is "
            "normalised in Hugging Face and not in vLLM; train it on layers up to "
            f"{last - 1}"
        )

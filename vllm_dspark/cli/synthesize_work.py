"""What `vllm-dspark synthesize` was told, read and checked."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_dspark import provenance

if TYPE_CHECKING:
    from vllm_dspark.train.plan import Settings
    from vllm_dspark.train.prompts import PromptSet, Renderer
    from vllm_dspark.train.synthesize import Goal
    from vllm_dspark.train.tokens import TokenWriter

NO_FILE = "none"  # instead of a prompt file: the target writes its own


@dataclass(frozen=True)
class Work:
    """All that a run needs besides a server.

    Args:
        folder: the target's.
        settings: what is asked.
        goal: when it is enough.
        prompts: of the files.
        renderer: of the target.
        writer: open on the token folder; whoever gets this closes it.
    """

    folder: Path
    settings: Settings
    goal: Goal
    prompts: PromptSet
    renderer: Renderer
    writer: TokenWriter


def prepare(arguments: argparse.Namespace) -> Work:
    """Read and check all that is given, before a server starts.

    Raises:
        ValueError: something is wrong or does not fit the folder, by name.
    """
    from vllm_dspark.model.target import find_target, identify_target
    from vllm_dspark.train.plan import Settings, parse_temperatures
    from vllm_dspark.train.prompts import SELF, Prompt, PromptSet, read_prompts
    from vllm_dspark.train.synthesize import Goal
    from vllm_dspark.train.tokens import TokenWriter

    goal = Goal(arguments.samples, arguments.tokens)
    files = [Path(name) for name in arguments.prompts if name != NO_FILE]
    own = NO_FILE in arguments.prompts
    folder = find_target(arguments.target)
    renderer = _renderer(folder)
    prompts = PromptSet()
    if files:
        prompts = read_prompts(files, renderer, arguments.max_prompt_tokens)
    if own and not renderer.is_chat:
        if files:
            raise ValueError(
                "a target without a chat template writes no prompts of its own: give "
                "either files or none"
            )
        prompts = PromptSet((Prompt(renderer.beginning(), SELF),))
        own = False
    settings = Settings(
        parse_temperatures(arguments.temperatures),
        arguments.max_prompt_tokens,
        arguments.max_response_tokens,
        arguments.min_response_tokens,
        arguments.max_turn_tokens,
        self_share=(arguments.self_share if files else 1.0) if own else 0.0,
        seed=arguments.seed,
    )
    writer = TokenWriter(
        arguments.out,
        target=identify_target(arguments.target),
        sampling={**asdict(settings), "prompts": prompts.facts},
        sources=sorted({p.source for p in prompts.prompts} | {SELF}),
        provenance=provenance.collect(),
    )
    return Work(folder, settings, goal, prompts, renderer, writer)


def _renderer(folder: Path) -> Renderer:
    from transformers import AutoTokenizer

    from vllm_dspark.train.prompts import Renderer

    try:
        return Renderer(AutoTokenizer.from_pretrained(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its tokenizer does not load: {error}") from error

"""Rounds from `decode.py`: the drafter and a Hugging Face target, no vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_dspark.calibration.rounds import PromptRounds
from vllm_dspark.cli.rounds.prompts import Prompt
from vllm_dspark.cli.rounds.settings import Decoding, Drafting


def collect(
    decoding: Decoding,
    drafting: Drafting,
    prompts: Sequence[Prompt],
    advance: Callable[[], None],
) -> dict[float, list[PromptRounds]]:
    """Decode every prompt at every temperature, one after another.

    Args:
        advance: called after each text.

    Raises:
        ValueError: the target does not load, or the drafter does not fit it.
    """
    import torch

    from vllm_dspark.decode import SamplingOptions, generate
    from vllm_dspark.proposer import DraftOptions

    if drafting.method != "dspark" or drafting.model is None:
        raise ValueError(
            f"engine torch drafts with DSpark drafters only, not by "
            f"{drafting.method!r}; use --engine vllm"
        )
    target, drafter = _load(decoding, drafting.model)
    options = DraftOptions(
        drafting.num_speculative_tokens, drafting.draft_sample_method
    )
    stop = stop_ids(target, decoding.target)
    found: dict[float, list[PromptRounds]] = {}
    for temperature in decoding.temperatures:
        sampling = SamplingOptions(decoding.max_tokens, temperature, stop)
        found[temperature] = texts = []
        for prompt in prompts:
            random = torch.Generator().manual_seed(prompt.number)
            (text,) = generate(
                target, drafter, [prompt.token_ids], sampling, options, random
            )
            texts.append(
                PromptRounds(
                    prompt.number,
                    prompt.dataset,
                    len(prompt.token_ids),
                    text.token_ids,
                    text.steps,
                )
            )
            advance()
    return found


def _load(decoding: Decoding, path: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    from vllm_dspark.model.checkpoint import load_config, load_drafter
    from vllm_dspark.model.fit import check_fit

    dtype = decoding.dtype
    try:
        target = AutoModelForCausalLM.from_pretrained(
            decoding.target, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        ).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"{decoding.target} does not load ({error})") from error
    check_fit(load_config(path), target.config.to_dict())
    drafter = load_drafter(
        path,
        target_embeddings=target.get_input_embeddings().weight,
        target_lm_head=target.get_output_embeddings().weight,
        dtype=target.dtype,
    )
    return target, drafter


def stop_ids(target: Any, name: str) -> frozenset[int]:
    """Tokens that end a text, as vLLM finds them: tokenizer and generation config."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    ends = target.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return frozenset(e for e in (*ends, tokenizer.eos_token_id) if e is not None)

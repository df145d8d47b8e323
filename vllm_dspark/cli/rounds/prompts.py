"""Prompt files: JSON lines in the OpenAI messages form, or plain text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DATASET = "prompts"  # of rows that name none


@dataclass(frozen=True)
class Prompt:
    """One prompt, tokenised for the target.

    Args:
        number: its place in the run, the same for every engine and drafter.
        dataset: the row's ``dataset`` field.
        token_ids: with the target's chat template if the row has messages.
    """

    number: int
    dataset: str
    token_ids: tuple[int, ...]


def read_rows(files: Sequence[Path], limit: int | None = None) -> list[dict[str, Any]]:
    """Rows of prompt files, each with ``dataset`` and ``messages`` or ``prompt``.

    Args:
        files: JSON lines files.
        limit: take the first rows of each dataset only, at most that many.

    Raises:
        ValueError: a file that is missing or empty, or a row that is no prompt.
    """
    rows: list[dict[str, Any]] = []
    taken: Counter[str] = Counter()
    for file in files:
        if not file.is_file():
            raise ValueError(f"--prompts: there is no file {file}")
        # Not splitlines(): a JSON string may hold other line separators as they are.
        lines = _text(file).split("\n")
        found = [
            _row(line, f"{file}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
        if not found:
            raise ValueError(f"{file} has no prompts; give one JSON object a line")
        for row in found:
            taken[row["dataset"]] += 1
            if limit is None or taken[row["dataset"]] <= limit:
                rows.append(row)
    return rows


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as text ({error})") from error


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error})") from None
    messages = row.get("messages") if isinstance(row, dict) else None
    text = row.get("prompt") if isinstance(row, dict) else None
    chat = isinstance(messages, list) and messages and all(map(_is_message, messages))
    if not chat and not (isinstance(text, str) and text):
        raise ValueError(
            f'{where}: neither "messages" (a list of {{"role", "content"}}) nor a '
            '"prompt" (text) in it'
        )
    dataset = str(row.get("dataset") or DATASET)
    return {"dataset": dataset, **({"messages": messages} if chat else {"text": text})}


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def tokenize(
    target: str, rows: Sequence[dict[str, Any]], max_tokens: int
) -> tuple[list[Prompt], int]:
    """Token ids of prompts, by the target's tokenizer and chat template.

    Args:
        target: model folder or name.
        rows: of `read_rows`.
        max_tokens: longer prompts are left out.

    Returns:
        The prompts, and how many were left out.

    Raises:
        ValueError: no tokenizer, no chat template for messages, or nothing left.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(target)
    except (OSError, ValueError) as error:
        raise ValueError(f"{target}: its tokenizer does not load ({error})") from error
    prompts = []
    for number, row in enumerate(rows):
        if "messages" in row:
            if not tokenizer.chat_template:
                raise ValueError(
                    f"{target} has no chat template, but prompts have messages; give "
                    'rows with a plain text "prompt" for a base model'
                )
            ids = tokenizer.apply_chat_template(
                row["messages"], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer.encode(row["text"])
        prompts.append(Prompt(number, row["dataset"], tuple(ids)))
    kept = [p for p in prompts if 0 < len(p.token_ids) <= max_tokens]
    if not kept:
        raise ValueError(
            f"all {len(prompts)} prompts are longer than {max_tokens} tokens; raise "
            "--max-prompt-tokens"
        )
    return kept, len(prompts) - len(kept)

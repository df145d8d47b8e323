"""What the target is asked: prompts of files, and user turns that it writes itself.

A chat target is asked in its own chat template. To let it write a user turn, the
template is cut where the user's words would begin, and the target goes on from there.
A base target continues plain text, or the start of a text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Ids = tuple[int, ...]
SELF = "self"  # source name of what the target asked itself
UNNAMED = "prompts"  # source name of rows without a dataset
# Shorter turns ("Hi!") hardly lead to an answer worth learning from.
MIN_TURN_CHARACTERS = 8
_SENTINEL = "dsparkSENTINELdspark"


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids that the target is asked with, and where they are from."""

    ids: Ids
    source: str


@dataclass(frozen=True, slots=True)
class Stop:
    """What ends a turn besides the target's end-of-text tokens."""

    ids: Ids = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Prompts of files, rendered and filtered.

    Args:
        prompts: no two alike, none too long.
        facts: for the manifest: files with hashes, rows, how many were dropped.
    """

    prompts: tuple[Prompt, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


class Renderer:
    """Prompts of a target's tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self.is_chat = bool(tokenizer.chat_template)

    def messages(self, messages: Sequence[dict[str, Any]]) -> Ids:
        """A conversation up to where the assistant's answer begins."""
        ids = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
        )
        return tuple(ids)

    def text(self, text: str) -> Ids:
        """Plain text, with what the tokenizer puts before it."""
        return tuple(self._tokenizer(text)["input_ids"])

    def beginning(self) -> Ids:
        """What a base target starts a text from: its BOS token.

        Raises:
            ValueError: it has neither a BOS nor an end-of-text token.
        """
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return (int(token),)
        raise ValueError(
            "the target's tokenizer has neither a chat template nor a BOS token to "
            "start from; give prompts with --prompts FILE"
        )

    def user_header(self) -> tuple[Ids, Stop]:
        """The chat template up to the user's words, and what follows them.

        Raises:
            ValueError: the template changes a user's words or does not show them.
        """
        message = [{"role": "user", "content": _SENTINEL}]
        text = self._tokenizer.apply_chat_template(message, tokenize=False)
        header, found, after = text.partition(_SENTINEL)
        if not found or not header:
            raise ValueError(
                "the target's chat template has no user header to continue from; give "
                "prompts with --prompts FILE"
            )
        following = self._encode(after)
        # Special tokens have no text in a server's answer: stop at the id.
        if following and following[0] in self._special:
            return self._encode(header), Stop(ids=following[:1])
        return self._encode(header), Stop(text=after or None)

    def own_prompt(self, turn: Sequence[int], stop: Stop) -> Ids | str:
        """The prompt for a user turn that the target wrote, or why it is of no use."""
        words = list(turn)
        while words and words[-1] in self._special:
            words.pop()
        if self._special.intersection(words):
            return "malformed prompt"  # it opened a turn within the turn
        text = self._tokenizer.decode(words)
        if stop.text:
            text = text.partition(stop.text)[0]
        if len(text.strip()) < MIN_TURN_CHARACTERS:
            return "short prompt"
        return self.messages([{"role": "user", "content": text.strip()}])

    def _encode(self, text: str) -> Ids:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def read_prompts(
    files: Sequence[Path], renderer: Renderer, max_tokens: int
) -> PromptSet:
    """Read JSONL rows of ``{"messages": [...]}`` or ``{"prompt": "text"}``.

    An optional ``"dataset"`` names the row's source. An assistant's answer at the end
    of a conversation is left out: the target gives its own.

    Args:
        files: in order.
        renderer: of the target.
        max_tokens: longer prompts are dropped and counted.

    Raises:
        ValueError: a file is missing, a row is malformed (its line is named), or fewer
            than two different prompts are left.
    """
    prompts: dict[Ids, Prompt] = {}
    rows = too_long = 0
    for file in files:
        for where, row in _rows(file):
            rows += 1
            ids = _render(row, renderer, where)
            if len(ids) > max_tokens:
                too_long += 1
            else:
                source = row.get("dataset", UNNAMED)
                if not isinstance(source, str):
                    raise ValueError(f"{where}: 'dataset' is {source!r}; a name")
                prompts.setdefault(ids, Prompt(ids, source))
    if len(prompts) < 2:
        raise ValueError(
            f"{', '.join(map(str, files))}: of {rows} rows, {len(prompts)} different "
            f"prompts are left ({too_long} are longer than --max-prompt-tokens "
            f"{max_tokens}); a drafter needs many. With `--prompts none` the target "
            "writes its own"
        )
    facts = {
        "files": [{"name": f.name, "sha256": _sha256(f)} for f in files],
        "rows": rows,
        "too_long": too_long,
        "duplicate": rows - too_long - len(prompts),
    }
    return PromptSet(tuple(prompts.values()), facts)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {file}: cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict) or ("messages" in row) == ("prompt" in row):
            raise ValueError(
                f'{where}: expected {{"messages": [...]}} or {{"prompt": "text"}}'
            )
        yield where, row


def _render(row: dict[str, Any], renderer: Renderer, where: str) -> Ids:
    if "prompt" in row:
        if not isinstance(row["prompt"], str) or not row["prompt"]:
            raise ValueError(f"{where}: 'prompt' is {row['prompt']!r}; a text")
        return renderer.text(row["prompt"])
    if not renderer.is_chat:
        raise ValueError(
            f"{where}: the target has no chat template for 'messages'; give "
            '{"prompt": "text"}'
        )
    messages = row["messages"]
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError(
            f'{where}: \'messages\' is no list of {{"role": "user", "content": "text"}}'
        )
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    if not messages or messages[-1]["role"] == "assistant":
        raise ValueError(f"{where}: there is no message to answer")
    try:
        return renderer.messages(messages)
    except Exception as error:  # templates raise what they like
        raise ValueError(f"{where}: the chat template refuses it: {error}") from error


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(
        isinstance(message.get(key), str) for key in ("role", "content")
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Chat requests with many different forms: schemas, tool calls, and free text between.

Random, but the same each time. What they ask for is finite, so that a random target
ends its answers, and without a character that JSON or a blank would have to escape.
"""

from __future__ import annotations

import enum
import json
import random
from dataclasses import dataclass
from typing import Any

SCHEMAS, TOOLS, FREE = 200, 50, 50
_WORDS = ["alpha", "beta", "gamma", "delta", "east", "west", "north", "red", "green"]


class Kind(enum.Enum):
    SCHEMA = "schema"
    TOOL = "tool"
    FREE = "free"


@dataclass(frozen=True)
class Form:
    """A request and what its answer has to be.

    Args:
        kind: what is asked for.
        greedy: whether it is answered greedily.
        schema: of the answer, or of the call's arguments; None for free text.
        settings: of a chat completion.
    """

    kind: Kind
    greedy: bool
    schema: dict[str, Any] | None
    settings: dict[str, Any]

    def is_valid(self, answer: tuple[Any, ...]) -> bool:
        """Whether (text, tool calls, finish reason) is of the form."""
        import jsonschema

        text, calls, _ = answer
        if self.schema is None:
            return bool(text)
        if self.kind is Kind.TOOL:
            if [name for name, _ in calls] != ["act"]:
                return False
            text = calls[0][1]
        try:
            jsonschema.validate(json.loads(text), self.schema)
        except (ValueError, TypeError, jsonschema.ValidationError):
            return False
        return True


def _leaf(source: random.Random) -> dict[str, Any]:
    kinds: list[dict[str, Any]] = [
        {"enum": source.sample(_WORDS, 3)},
        {"type": "boolean"},
        {"type": "string", "pattern": f"^[a-{source.choice('dkz')}]{{2,8}}$"},
        {"type": "integer", "minimum": 0, "maximum": source.choice([9, 40, 500])},
        {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        {"const": source.choice(_WORDS)},
    ]
    return source.choice(kinds)


def _object(source: random.Random, depth: int) -> dict[str, Any]:
    names = source.sample(_WORDS, source.randint(1, 3))
    properties = {
        name: _object(source, depth - 1)
        if depth and source.random() < 0.3
        else _leaf(source)
        for name in names
    }
    return {
        "type": "object",
        "properties": properties,
        "required": source.sample(names, source.randint(1, len(names))),
        "additionalProperties": False,
    }


def requests(seed: int = 0) -> list[Form]:
    """All of them, in random order, every other one sampled."""
    source = random.Random(seed)
    kinds = [Kind.SCHEMA] * SCHEMAS + [Kind.TOOL] * TOOLS + [Kind.FREE] * FREE
    source.shuffle(kinds)
    return [_request(source, number, kind) for number, kind in enumerate(kinds)]


def _request(source: random.Random, number: int, kind: Kind) -> Form:
    settings: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"{source.choice(_WORDS)} {number}"}],
        "temperature": 1.0 if number % 2 else 0.0,
        "max_tokens": 24,
    }
    if kind is Kind.FREE:
        return Form(kind, not number % 2, None, settings)
    schema = _object(source, 1)
    settings |= {"max_tokens": 200, "own": {"ignore_eos": False}}
    if kind is Kind.SCHEMA:
        form = {"name": "form", "schema": schema}
        settings["response_format"] = {"type": "json_schema", "json_schema": form}
    else:
        function = {"name": "act", "parameters": schema}
        settings["tools"] = [{"type": "function", "function": function}]
        named = {"type": "function", "function": {"name": "act"}}
        settings["tool_choice"] = named if number % 4 < 2 else "required"
        settings["parallel_tool_calls"] = False
    return Form(kind, not number % 2, schema, settings)

"""Strategies for what no file or option should hold, and for damage to good ones."""

from __future__ import annotations

import copy
import json
import os
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# The same examples each time: what CI finds is found again. Fixtures of one test for
# all of its examples (the health check is about them) are read or written anew.
FUZZ = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 300),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 1 << 63, 1e308, 5e-324]),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "adaptive", "full_attention", "\x00", "../..", "F32"]),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=6), inner, max_size=3),
    ),
    max_leaves=4,
)


def _paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    if isinstance(value, dict):
        children: Any = value.items()
    elif isinstance(value, list):
        children = enumerate(value)
    else:
        return found
    for key, child in children:
        found += _paths(child, (*at, key))
    return found


@st.composite
def edited(draw: st.DrawFn, sound: Any) -> Any:
    """A copy of a JSON value in which one to three things are other ones, or gone."""
    value = copy.deepcopy(sound)
    for _ in range(draw(st.integers(1, 3))):
        paths = _paths(value)
        if not paths:
            break
        *parents, last = draw(st.sampled_from(paths))
        owner = value
        for key in parents:
            owner = owner[key]
        if draw(st.integers(0, 4)) == 0:
            del owner[last]
        else:
            owner[last] = draw(JSON)
    return value


@st.composite
def damaged(draw: st.DrawFn, sound: bytes, within: int | None = None) -> bytes:
    """Bytes of which some have other bits, some are missing, or some came in between.

    Args:
        sound: the content.
        within: damage only so many bytes of the beginning; None: all.
    """
    end = min(within or len(sound), len(sound))
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(min(end, len(content)) - 1, 0)))
        kind = draw(st.integers(0, 3))
        if kind == 0:
            del content[at:]
        elif kind == 1 and content:
            del content[at : at + draw(st.integers(1, 40))]
        elif kind == 2:
            content[at:at] = draw(st.binary(min_size=1, max_size=12))
        elif content:
            content[at] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


def dumped(value: Any) -> bytes:
    """As Python writes JSON, NaN and unpaired surrogates included."""
    return json.dumps(value).encode("utf-8", "surrogatepass")

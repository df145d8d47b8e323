"""Whatever an operator or a client types: it is taken, or a ValueError says why not."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.damage import FUZZ, JSON, edited
from vllm_dspark.config import DSparkOptions, resolve_num_speculative_tokens
from vllm_dspark.schedule.controller import Controller

SOUND = {
    "backend": "auto",
    "policy": "threshold",
    "threshold": 0.25,
    "bypass": False,
    "slo_tps": 20,
    "trace": "trace.jsonl",
    "cost_table": None,
    "rejection_kernel": "auto",
}
NAMES = [spec.name for spec in fields(DSparkOptions)]


def taken(raw: Any) -> DSparkOptions | None:
    try:
        found = DSparkOptions.from_dict(raw)
    except ValueError as error:
        assert str(error)
        return None
    Controller(5, found)  # what it says can be done
    return found


@FUZZ
@given(JSON)
def test_anything(raw: Any) -> None:
    found = taken(raw)
    assert found is None or raw is None or set(raw) <= set(NAMES)


@FUZZ
@given(edited(SOUND))
def test_options_with_mistakes(raw: dict[str, Any]) -> None:
    found = taken(raw)
    if found is not None:
        assert {name: getattr(found, name) for name in raw} == raw
        assert 0 <= found.threshold <= 1 and 0 <= found.slo_tps <= 1e6


@FUZZ
@given(st.dictionaries(st.sampled_from(NAMES), JSON, min_size=1))
def test_known_keys_with_any_value(raw: dict[str, Any]) -> None:
    taken(raw)


@FUZZ
@given(JSON, st.integers(1, 64))
def test_numbers_of_drafts(asked: Any, block: int) -> None:
    try:
        found = resolve_num_speculative_tokens(asked, block)
    except ValueError:
        return
    assert 1 <= found <= block

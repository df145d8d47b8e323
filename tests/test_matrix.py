"""README's compatibility table is rendered, and every row's tests exist."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

import pytest

from tests.integration.matrix_requests import FEATURES
from tests.matrix import ROWS, SERVER, Row, render

TESTS = Path(__file__).parent


def test_readme_has_the_table() -> None:
    """If not: ``python -m tests.matrix`` prints what belongs there."""
    assert render() in (TESTS.parent / "README.md").read_text()


@lru_cache
def functions(file: str) -> set[str]:
    body = ast.parse((TESTS / file).read_text()).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.feature)
def test_every_row_is_tested(row: Row) -> None:
    assert row.tests
    for test in row.tests:
        file, _, name = test.partition("::")
        function, _, parameter = name.rstrip("]").partition("[")
        assert function.startswith("test_") and function in functions(file), test
        assert not parameter or parameter in FEATURES, test


def test_every_feature_of_the_server_is_in_the_table() -> None:
    named = {test for row in ROWS for test in row.tests}
    assert {f"{SERVER}::test_feature[{name}]" for name in FEATURES} <= named

"""README's compatibility table is rendered, and every row's tests exist."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path

import pytest

from tests.matrix import ROWS, render

TESTS = Path(__file__).parent


def test_readme_has_the_table() -> None:
    """If not: ``python -m tests.matrix`` prints what belongs there."""
    assert render() in (TESTS.parent / "README.md").read_text()


@lru_cache
def functions(file: str) -> dict[str, str]:
    """Test functions of a file, and its whole text for their parameters."""
    text = (TESTS / file).read_text()
    found = [n.name for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    return dict.fromkeys((name for name in found if name.startswith("test_")), text)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.feature)
def test_every_row_is_tested(row) -> None:
    assert row.tests
    for test in row.tests:
        file, _, name = test.partition("::")
        function, _, parameter = name.rstrip("]").partition("[")
        assert function in functions(file), test
        if parameter:
            assert f'"{parameter}": ' in functions(file)[function], test


def test_every_feature_of_the_server_is_in_the_table() -> None:
    from tests.integration.test_matrix_server import FEATURES

    named = {test for row in ROWS for test in row.tests}
    prefix = "integration/test_matrix_server.py::test_feature"
    assert {f"{prefix}[{name}]" for name in FEATURES} <= named

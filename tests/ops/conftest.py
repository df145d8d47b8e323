"""Fixtures of the op tests: which instruction set the native kernels run with."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from vllm_dspark.ops import extension_native, native_status

ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small operations are slow on a team of busy cores; tests of teams ask for one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def native() -> None:
    """The extension must be there, unless it was left out on purpose."""
    if os.environ.get("VLLM_DSPARK_NO_EXT", "0") not in {"", "0"}:
        pytest.skip("VLLM_DSPARK_NO_EXT is set")
    status = native_status()
    assert status.available, status.reason


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Runs a test once with each instruction set this machine has."""
    module = extension_native.require()
    best = module.set_isa("auto")
    if ISAS.index(request.param) > ISAS.index(best):
        pytest.skip(f"this machine stops at {best}")
    assert module.set_isa(request.param) == request.param
    yield request.param
    module.set_isa("auto")

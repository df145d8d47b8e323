"""Fixtures shared by all tests; heavy imports stay inside them."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent

# A shell that starts a job in the background has it ignore Ctrl-C, and what it starts
# inherits that; some tests are about Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# What takes minutes in `make test-all`, longest first.
LONG_FILES = (
    "integration/test_v2_control.py",
    "integration/test_v2_distribution.py",
    "integration/test_sampled_distribution.py",
    "integration/test_lossless_demo.py",
    "integration/test_v2_adapter.py",
    "integration/test_chain.py",
    "integration/test_v2_rejection_kernel.py",
    "integration/test_matrix_server.py",
    "integration/test_oracle_v2.py",
    "integration/test_adaptive.py",
    "cli/test_demo.py",
    "integration/test_plugin.py",
    "integration/test_stats.py",
    "integration/test_matrix_offline.py",
    "integration/test_server.py",
    "ops/test_sequential_triton.py",
    "integration/test_acceptance_steady.py",
    "integration/test_kept_cost.py",
    "benchmarks/test_serve_sweep.py",
)


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    """Long files first where processes share them: the last one is waited for."""
    if not hasattr(config, "workerinput"):  # no process of pytest-xdist
        return

    def place(item: pytest.Item) -> int:
        file = item.path.relative_to(REPOSITORY / "tests").as_posix()
        if file in LONG_FILES:
            return LONG_FILES.index(file)
        return len(LONG_FILES) + (not file.startswith("integration/"))

    items.sort(key=place)


@pytest.fixture(scope="session")
def demo_drafter() -> Path:
    """The drafter that the repository ships."""
    return REPOSITORY / "models" / "smollm2-135m-dspark"


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny Llama target (see `tests.tiny`)."""
    from tests.tiny import make_tiny_target

    return make_tiny_target(tmp_path_factory.mktemp("tiny-target"))


@pytest.fixture(scope="session")
def tiny_drafter(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """Folder of its drafter with vanilla and confidence heads."""
    from tests.tiny import make_tiny_drafter

    return make_tiny_drafter(tmp_path_factory.mktemp("tiny-drafter"), tiny_target)


@pytest.fixture(scope="session")
def text_pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny target with a tokenizer, and its drafter."""
    from tests.tiny import make_tiny_drafter, make_tiny_target, make_tiny_tokenizer

    folder = tmp_path_factory.mktemp("text-pair")
    target = make_tiny_target(folder / "target")
    make_tiny_tokenizer(target)
    return target, make_tiny_drafter(folder / "drafter", target)


@pytest.fixture(autouse=True)
def our_log() -> None:
    """Engines of other tests leave vLLM's handlers and level on our logger."""
    log = logging.getLogger("vllm_dspark")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)

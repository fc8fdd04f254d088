"""Fixtures shared by all tests."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
# The suite is for gloo ranks on a CPU, also on a machine with a GPU; `make gpu` is what runs there.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

from absl import logging as absl_logging

from tests.helpers.layout_table import GradientTable, LayoutTable
from tests.helpers.pool import WorkerPool

# Hydra closes every log handler when it configures logging. absl's, which Megatron-Core 0.17 and
# later bring, closes its stream too unless that is the real one; pytest's capture would be lost.
absl_logging.get_absl_handler().python_handler.stream = sys.__stderr__


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the longest time limits come first: a long one that comes last runs alone."""
    limits: dict[Path, float] = {}
    for item in items:
        mark = item.get_closest_marker("timeout")
        limit = mark.args[0] if mark else 0
        limits[item.path] = max(limit, limits.get(item.path, 0))
    items.sort(key=lambda item: -limits[item.path])


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerPool]:
    """``ranks.run(n, fn, *args)``: run ``fn`` on n gloo ranks."""
    pool = WorkerPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def layout_table() -> Iterator[LayoutTable]:
    """Collects the rows of the table in docs/layouts.md; MINITRON_WRITE_DOCS=1 writes them."""
    table = LayoutTable()
    yield table
    if os.environ.get("MINITRON_WRITE_DOCS") == "1" and table.rows:
        table.write()


@pytest.fixture(scope="session")
def gradient_table() -> Iterator[GradientTable]:
    """Write the table of gradients, as ``layout_table`` does for scores."""
    table = GradientTable()
    yield table
    if os.environ.get("MINITRON_WRITE_DOCS") == "1" and table.rows:
        table.write()

"""Fixtures shared by all tests."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

from tests.pool import WorkerPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[WorkerPool]:
    """``ranks.run(n, fn, *args)``: run ``fn`` on n gloo ranks."""
    pool = WorkerPool()
    yield pool
    pool.close()

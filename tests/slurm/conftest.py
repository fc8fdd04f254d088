"""The SLURM that the tests of this folder share, and one whose nodes may die."""

import os
from collections.abc import Callable, Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running cluster; skipped where SLURM is not installed, unless MINITRON_SLURM=required."""
    yield from _started(Cluster)


@pytest.fixture
def mortal() -> Iterator[Cluster]:
    """One of its own for a test that kills a node."""
    yield from _started(lambda: Cluster(kill_wait=2))


def _started(make: Callable[[], Cluster]) -> Iterator[Cluster]:
    if missing():
        message = f"no SLURM here ({', '.join(missing())}): run `make slurm` as root on Debian"
        if os.environ.get("MINITRON_SLURM") == "required":
            pytest.fail(message)
        pytest.skip(message)
    cluster = make()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()

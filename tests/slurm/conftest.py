"""The SLURM that the tests of this folder share."""

import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    """A running cluster; skipped where SLURM is not installed, unless MINITRON_SLURM=required."""
    if missing():
        message = f"no SLURM here ({', '.join(missing())}): run `make slurm` as root on Debian"
        if os.environ.get("MINITRON_SLURM") == "required":
            pytest.fail(message)
        pytest.skip(message)
    cluster = Cluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()

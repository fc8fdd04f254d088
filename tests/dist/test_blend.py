"""A training on a blend reads the same samples at every layout, and after it was killed."""

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.blend import BATCH, DIES_AT, MODEL, SAVED_AT, STEPS, WEIGHTS, train
from tests.helpers.data_fixtures import write_pair
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import write_weights

TP2 = ParallelConfig(tensor_model_parallel_size=2)
TP2_PP2 = ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
# Layout -> ranks, and how many next to each other read the same.
LAYOUTS = {
    "dp1": (1, 1, ParallelConfig()),
    "dp2": (2, 1, ParallelConfig()),
    "dp4": (4, 1, ParallelConfig()),
    "tp2": (2, 2, TP2),
    "tp2_pp2": (4, 4, TP2_PP2),
}
CHANGED = {"blend_changes": [{"step": DIES_AT, "weights": [0, 5, 1, 1, 1]}]}


class Runs:
    """Training runs on the same sources, each layout's data built on its own."""

    def __init__(self, ranks, folder: Path) -> None:
        self.ranks, self.folder = ranks, folder
        for source in range(len(WEIGHTS)):
            write_pair(folder / f"s{source}", 8 + 4 * source, seed=source)
        write_weights(folder / "weights", MODEL, seed=1)

    def run(self, layout: str, name: str, ranks=None, dies=False, **data):
        """Samples in the order of the run, and the history of rank 0."""
        size, copies, parallel = LAYOUTS[layout]
        work = str(self.folder / name / "work")
        found = (ranks or self.ranks).run(size, train, str(self.folder), work, parallel, data, dies)
        if isinstance(found[0], str):
            return found[0]
        for rank, (read, _) in enumerate(found):
            assert read == found[rank // copies * copies][0]
        return sorted(one for read, _ in found[::copies] for one in read), found[0][1]

    def killed(self, name: str) -> None:
        """Kill a run at TP 2 with SIGKILL and return what it leaves."""
        before = self.folder / "killed"
        if not before.exists():
            pool = WorkerPool()
            try:
                with pytest.raises((EOFError, ConnectionResetError)):
                    self.run("tp2", before.name, ranks=pool, dies=True)
            finally:
                pool.close()
            assert (before / f"work/checkpoints/step={SAVED_AT}").is_dir()
        shutil.copytree(before, self.folder / name)


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory) -> Runs:
    return Runs(ranks, tmp_path_factory.mktemp("blend"))


@pytest.fixture(scope="module")
def alone(runs):
    """Run the training on one rank."""
    return runs.run("dp1", "dp1")


def _same_curve(history, want, rtol: float = 0) -> None:
    keys = [key for key in want[0] if key.startswith("epochs/")]
    assert len(keys) == len(WEIGHTS)
    for got, wanted in zip(history, want, strict=True):
        assert all(got[key] == wanted[key] for key in keys)
        for key in wanted.keys() & {"loss", "val_loss"}:
            torch.testing.assert_close(got[key], wanted[key], rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("layout", ["dp2", "dp4", "tp2_pp2"])
def test_every_layout_reads_the_same(runs, alone, layout):
    read, history = runs.run(layout, layout)
    assert [index for index, *_ in read] == list(range(STEPS * BATCH))
    assert read == alone[0]
    _same_curve(history, alone[1])


@pytest.mark.parametrize("layout", ["tp2", "dp4"])
def test_goes_on_after_it_was_killed(runs, alone, layout):
    """At its own layout and at another one."""
    runs.killed(f"killed_{layout}")
    read, history = runs.run(layout, f"killed_{layout}")
    assert read == alone[0][SAVED_AT * BATCH :]
    _same_curve(history, alone[1])


def test_goes_on_with_other_weights_where_it_is_told_to(runs, alone):
    """It equals a run with these weights from the start; trained steps cannot change."""
    wanted = runs.run("dp1", "told", **CHANGED)
    assert wanted[0][: DIES_AT * BATCH] == alone[0][: DIES_AT * BATCH]
    after = [source for _, source, *_ in wanted[0][DIES_AT * BATCH :]]
    assert [after.count(i) for i in range(len(WEIGHTS))] == [0, 10, 2, 2, 2]
    for source in range(1, len(WEIGHTS)):
        samples = [sample for _, this, sample, _ in wanted[0] if this == source]
        assert all(second == first + 1 for first, second in pairwise(samples))

    runs.killed("changed")
    early = {"blend_changes": [{"step": SAVED_AT - 1, "weights": [1, 1, 1, 1, 1]}]}
    refused = runs.run("dp2", "changed", **early)
    assert f"before step {SAVED_AT}, and this run has trained so far with none" in refused
    read, history = runs.run("dp2", "changed", **CHANGED)
    assert read == wanted[0][SAVED_AT * BATCH :]
    _same_curve(history, wanted[1])
    # The same holds for a run that goes on behind the change.
    assert "has none before step 6" in runs.run("dp2", "changed")

"""``trainer.straggler_ratio`` names the rank that the others wait for."""

import socket

import pytest
import torch

from nemo_minitron.checkpoint.progress import read_progress
from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.models import stragglers
from tests.cases.spiky import train
from tests.helpers.tiny import LLAMA, write_weights


def test_a_slow_replica_is_named(ranks, tmp_path):
    """Rank 1 has a sample of each batch that takes half a second; every second step is logged."""
    write_weights(tmp_path / "weights", LLAMA, 1)
    keys = {"straggler_ratio": 1.5, "log_every_n_steps": 2}
    batches = list(range(5))
    paths = str(tmp_path / "weights"), str(tmp_path / "work")
    for history, _ in ranks.run(2, train, *paths, "slow", keys, batches, len(batches)):
        assert [record["slowest_rank"] for record in history] == [1, 1, 1]
        assert min(record["slowest_ratio"] for record in history) > 1.5
    said, _ = read_progress(tmp_path / "work")
    assert said["slow"].startswith(f"rank 1 on {socket.gethostname()}, ")


class _Model:
    """A stand-in for the model with the methods that the comparison uses."""

    def __init__(self) -> None:
        self.last_metrics = {"loss": 1.0}

    def log(self, name: str, value: float, **more: object) -> None:
        self.last_metrics[name] = value


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ((1.0, 1.1, 1.49, 0.9), ""),
        ((1.0, 1.1, 1.6, 0.9), "rank 2 on c, 1.60 times the median"),
        ((2.0, 1.0), "rank 0 on a, 2.00 times the median"),
        ((2.0,), ""),
    ],
)
def test_who_is_slow(monkeypatch, caplog, seconds, said):
    """The median is the lower one of an even number, so that one of two ranks can be slow."""

    def gather(into: list[torch.Tensor], mine: torch.Tensor, group: object) -> None:
        assert mine.item() == 3.0
        for tensor, value in zip(into, seconds, strict=True):
            tensor.fill_(value)

    monkeypatch.setattr(stragglers.dist, "all_gather", gather)
    callback, model = stragglers.Stragglers(1.5), _Model()
    callback._nodes, callback._parts = list("abcd")[: len(seconds)], [(0.0, 2.0), (3.0, 7.0)]
    callback.on_train_batch_end(None, model)
    assert callback.found == said
    assert [said in record.message for record in caplog.records] == [True] * bool(said)
    assert ("slowest_rank" in model.last_metrics) == bool(said)
    assert not callback._parts


def test_a_ratio_that_names_half_of_the_ranks_is_refused():
    with pytest.raises(ValueError, match=r"trainer.straggler_ratio=1 must be above 1, or 0"):
        TrainerConfig(straggler_ratio=1.0)

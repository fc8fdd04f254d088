"""The order of samples does not depend on the layout and survives a restart."""

import itertools

import numpy as np
import pytest
import torch

from nemo_minitron.data.sampler import GlobalBatchSampler, build_dataloader
from nemo_minitron.data.samples import NpyDataset
from tests.helpers.data_fixtures import data_config


def _batches(total, consumed, micro, world, gbs, drop_last=True):
    """Per global batch, the samples of all ranks; also checks that ranks agree on the count."""
    ranks = [
        GlobalBatchSampler(
            total_samples=total,
            consumed_samples=consumed,
            micro_batch_size=micro,
            global_batch_size=gbs,
            dp_rank=rank,
            dp_size=world,
            drop_last=drop_last,
        )
        for rank in range(world)
    ]
    lists = [list(rank) for rank in ranks]
    assert all(len(rank) == len(read) for rank, read in zip(ranks, lists, strict=True))
    assert len({len(read) for read in lists}) == 1
    assert all(len(one) == micro for read in lists for one in read)
    per_batch = gbs // (micro * world)
    return [
        [x for read in lists for one in read[k : k + per_batch] for x in one]
        for k in range(0, len(lists[0]), per_batch)
    ]


LAYOUTS = [(m, w) for m, w in itertools.product((1, 2, 3, 4, 6, 12), repeat=2) if 12 % (m * w) == 0]


@pytest.mark.parametrize(("micro", "world"), LAYOUTS)
def test_a_global_batch_is_the_same_samples_at_every_layout(micro, world):
    batches = _batches(41, 0, micro, world, 12)
    assert [sorted(b) for b in batches] == [list(range(k, k + 12)) for k in (0, 12, 24)]
    last = _batches(41, 0, micro, world, 12, drop_last=False)
    assert len(last) == 4
    assert sorted(x for x in last[-1] if x is not None) == list(range(36, 41))
    assert last[-1].count(None) == 7


def test_resume_goes_on_with_the_next_sample_at_another_layout():
    whole = _batches(48, 0, 2, 2, 8)
    rest = _batches(48, 16, 1, 4, 8)
    assert [sorted(b) for b in rest] == [sorted(b) for b in whole[2:]]
    assert _batches(48, 48, 1, 1, 8) == []
    with pytest.raises(ValueError, match=r"consumed_samples=49 of the resumed run"):
        _batches(48, 49, 1, 1, 8)


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_collates_and_fills_the_last_batch(workers):
    ids = np.arange(5 * 4).reshape(5, 4)
    data = data_config("x", micro_batch_size=2, global_batch_size=4, seq_length=4)
    tokens, masks = [], []
    for rank in range(2):
        loader = build_dataloader(
            NpyDataset(ids, 5), data, dp_rank=rank, dp_size=2, drop_last=False, num_workers=workers
        )
        assert len(loader) == 2
        for batch in loader:
            assert batch["tokens"].shape == (2, 4)
            assert batch["tokens"].dtype == torch.int64
            assert batch["loss_mask"].dtype == torch.float32
            tokens.append(batch["tokens"])
            masks.append(batch["loss_mask"].sum(1))
    counted = torch.cat(tokens)[torch.cat(masks) > 0]
    assert sorted(counted[:, 0].tolist()) == ids[:, 0].tolist()


def test_uneven_batches_are_refused():
    data = data_config("x", micro_batch_size=3, global_batch_size=8)
    with pytest.raises(ValueError, match=r"data.global_batch_size=8 must be a multiple"):
        build_dataloader(
            NpyDataset(np.zeros((2, 4)), 2), data, dp_rank=0, dp_size=1, drop_last=True
        )

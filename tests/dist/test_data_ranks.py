"""Ranks of a gloo group build and read the same data, one of them writing it."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.data.blend import BlendedSamples
from nemo_minitron.data.datasets import build_datasets, prepare_tokens, training_datasets
from nemo_minitron.data.sampler import build_dataloader
from tests.helpers.data_fixtures import (
    data_config,
    make_texts,
    save_tokenizer,
    write_jsonl,
    write_pair,
)
from tests.helpers.tiny import LLAMA


def _rank(rank: int, world: int, folder: Path, vocab_size: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    data = data_config(folder / "a.jsonl", micro_batch_size=2, global_batch_size=8)
    tokens = prepare_tokens(
        data,
        vocab_size=vocab_size,
        cache=folder / "cache",
        tokenizer_dir=folder / "tokenizer",
        splits=("train", "validation"),
    )
    train, _, _ = build_datasets(data, tokens, (24, 8, 0))
    assert train is not None
    loader = build_dataloader(train, data, dp_rank=rank, dp_size=world, drop_last=True)
    mine = torch.stack([batch["tokens"] for batch in loader])  # [micro-batches, 2, s]
    gathered = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(gathered, mine)
    if rank == 0:
        torch.save(torch.stack(gathered), folder / "batches.pt")
    dist.destroy_process_group()


def test_ranks_read_what_one_rank_would(tmp_path):
    texts = make_texts(40)
    write_jsonl(tmp_path / "a.jsonl", texts)
    vocab_size = save_tokenizer(tmp_path / "tokenizer", texts)
    mp.spawn(_rank, (2, tmp_path, vocab_size), nprocs=2)
    batches = torch.load(tmp_path / "batches.pt")  # [ranks, micro-batches, 2, s]

    data = data_config(tmp_path / "a.jsonl", micro_batch_size=2, global_batch_size=8)
    tokens = prepare_tokens(
        data,
        vocab_size=vocab_size,
        cache=tmp_path / "cache",
        tokenizer_dir=tmp_path / "tokenizer",
        splits=("train",),
    )
    train = build_datasets(data, tokens, (24, 0, 0))[0]
    assert train is not None
    alone = torch.stack([train[i]["tokens"] for i in range(24)])
    assert torch.equal(batches.transpose(0, 1).reshape(24, -1), alone)


# Layout -> ranks that read the same samples next to each other, as Megatron numbers them.
LAYOUTS = {"dp4": 1, "tp2_dp2": 2, "tp2_pp2": 4}
STEPS, STOPPED_AT, BATCH = 6, 2, 8


def _blend(folder: Path) -> DataConfig:
    sources = [{"weight": w, "path": str(folder / f"s{i}")} for i, w in enumerate((3, 1, 2, 4, 5))]
    return DataConfig(path="", blend=sources, seq_length=16, split="1", global_batch_size=BATCH)


def _samples(folder: Path, out: str) -> BlendedSamples:
    trainer = TrainerConfig(max_steps=STEPS, limit_val_batches=0)
    train, _ = training_datasets(
        _blend(folder), trainer, LLAMA, folder, str(folder / out / "run"), ("train",)
    )
    assert isinstance(train, BlendedSamples)
    return train


def _blend_rank(rank: int, world: int, folder: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world
    )
    train, found = _samples(folder, "ranks"), {}
    for layout, copies in LAYOUTS.items():
        share = {"dp_rank": rank // copies, "dp_size": world // copies}
        for consumed in (0, STOPPED_AT * BATCH):
            loader = build_dataloader(
                train, _blend(folder), consumed_samples=consumed, drop_last=True, **share
            )
            mine = torch.cat([batch["tokens"] for batch in loader])
            gathered = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(gathered, mine)
            assert all(
                torch.equal(mine, gathered[rank // copies * copies + i]) for i in range(copies)
            )
            found[layout, consumed] = torch.stack(gathered[::copies], dim=1).flatten(0, 1)
    if rank == 0:
        torch.save(found, folder / "found.pt")
    dist.destroy_process_group()


def test_a_blend_is_the_same_at_every_layout_and_after_a_resume(tmp_path):
    """Whatever the layout before and after, sample ``i`` of the run is the one of one rank."""
    for i in range(5):
        write_pair(tmp_path / f"s{i}", 10 + 5 * i, seed=i)
    alone = _samples(tmp_path, "alone")
    wanted = torch.stack([alone[i]["tokens"] for i in range(STEPS * BATCH)])
    assert np.bincount(alone.order.source).tolist() == [10, 3, 6, 13, 16]
    mp.spawn(_blend_rank, (4, tmp_path), nprocs=4)
    for (_, consumed), tokens in torch.load(tmp_path / "found.pt").items():
        assert torch.equal(tokens, wanted[consumed:])

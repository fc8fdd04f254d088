"""Ranks of a gloo group build and read the same data, one of them writing it."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_minitron.data.datasets import build_datasets, prepare_tokens
from nemo_minitron.data.sampler import build_dataloader
from tests.helpers.data_fixtures import data_config, make_texts, save_tokenizer, write_jsonl


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

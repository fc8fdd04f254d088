"""Which samples each data-parallel rank reads in which order, and the loader that reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.checks import check_batch_sizes


@dataclass(kw_only=True, eq=False)
class GlobalBatchSampler(Sampler[list[int | None]]):
    """Micro-batches of one data-parallel rank, in Megatron's order.

    Global batch ``k`` is samples ``[k * global_batch_size, (k + 1) * global_batch_size)`` at every
    micro-batch size and data-parallel size: a layout decides only who reads which part of it, and
    a run that stopped after ``consumed_samples`` goes on with the next sample, at any layout.
    """

    total_samples: int
    """Samples to read in all, by all ranks together."""
    consumed_samples: int
    """Samples that earlier global batches took."""
    micro_batch_size: int
    """Samples of a micro-batch."""
    global_batch_size: int
    """Samples of an optimizer step over all ranks: a multiple of micro_batch_size * dp_size."""
    dp_rank: int
    """Data-parallel rank of this process."""
    dp_size: int
    drop_last: bool
    """Whether an incomplete last global batch is left out. Otherwise it is filled up with
    ``None``, so that all ranks see equally many micro-batches."""

    def __post_init__(self) -> None:
        """Refuse a resumed run whose data ended before the step that it resumes at."""
        if not 0 <= self.consumed_samples <= self.total_samples:
            raise ValueError(
                f"consumed_samples={self.consumed_samples} of the resumed run lies outside the "
                f"{self.total_samples} samples of this one; set trainer.max_steps and "
                "data.global_batch_size as they were, or larger"
            )

    def __len__(self) -> int:
        """Return the number of micro-batches that are left on this rank."""
        left = self.total_samples - self.consumed_samples
        batches = left // self.global_batch_size
        if not self.drop_last and left % self.global_batch_size:
            batches += 1
        return batches * self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> Iterator[list[int | None]]:
        """Indices of one micro-batch at a time; None stands for a filler sample."""
        step = self.micro_batch_size * self.dp_size
        start = self.consumed_samples + self.dp_rank * self.micro_batch_size
        for first in range(start, start + len(self) * step, step):
            indices = range(first, first + self.micro_batch_size)
            yield [index if index < self.total_samples else None for index in indices]


def build_dataloader(
    dataset: Dataset[dict[str, torch.Tensor]],
    data: DataConfig,
    *,
    dp_rank: int,
    dp_size: int,
    consumed_samples: int = 0,
    drop_last: bool,
    num_workers: int = 0,
) -> DataLoader[dict[str, torch.Tensor]]:
    """Return micro-batches ``[micro_batch_size, seq_length]`` of one data-parallel rank.

    Args:
        dataset: all samples, of all ranks, in global order (``datasets.build_datasets``).
        data: gives the batch sizes.
        dp_rank: data-parallel rank of this process.
        dp_size: data-parallel size.
        consumed_samples: samples that earlier global batches took.
        drop_last: True for training. False for evaluation and calibration, where every sample
            counts once: the last global batch is filled with samples whose ``loss_mask`` is all
            0, which the caller must leave out of every statistic.
        num_workers: reader processes; 0 reads in this one.

    Raises:
        ValueError: the batch sizes do not divide, or ``consumed_samples`` lies outside the data.
    """
    check_batch_sizes(data, dp_size)
    sampler = GlobalBatchSampler(
        total_samples=len(dataset),  # type: ignore[arg-type]  # torch's Dataset declares no length
        consumed_samples=consumed_samples,
        micro_batch_size=data.micro_batch_size,
        global_batch_size=data.global_batch_size,
        dp_rank=dp_rank,
        dp_size=dp_size,
        drop_last=drop_last,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )

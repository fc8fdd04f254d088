"""Which samples run when: the calibration set on any layout, from any run of it on."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from torch.utils.data import Dataset

from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.sampler import build_dataloader
from nemo_minitron.data.samples import FirstSamples
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import Batch, on_this_cp_rank
from nemo_minitron.runtime.groups import ParallelGroups


@dataclass(frozen=True)
class Calibration:
    """How the samples are spread over micro-batches and data-parallel ranks.

    Micro-batch ``k`` of data-parallel rank ``r`` holds the samples from ``(k * dp_size + r) *
    micro_batch_size`` on; those past the end are filler that counts for nothing, so the scores do
    not depend on any of these numbers but ``samples``.
    """

    samples: int
    micro_batch_size: int
    global_batch_size: int
    dp_rank: int
    dp_size: int
    pp_size: int
    interleaved: bool

    @classmethod
    def of(
        cls, samples: int, data: DataConfig, groups: ParallelGroups, *, interleaved: bool
    ) -> "Calibration":
        """Return the calibration on ``samples`` samples at the current layout."""
        return cls(
            samples=samples,
            micro_batch_size=data.micro_batch_size,
            global_batch_size=data.global_batch_size,
            dp_rank=groups.dp.rank(),
            dp_size=groups.dp.size(),
            pp_size=groups.pp.size(),
            interleaved=interleaved,
        )

    def valid(self, micro_batch: int) -> int:
        """Return leading samples of a micro-batch of this rank that are not filler."""
        start = (micro_batch * self.dp_size + self.dp_rank) * self.micro_batch_size
        return min(max(self.samples - start, 0), self.micro_batch_size)

    def done(self, runs: int) -> int:
        """Return samples of the first ``runs`` runs of the schedule, over all ranks."""
        return min(runs * self.global_batch_size, self.samples)

    def schedule(self) -> list[int]:
        """Return micro-batches per run of the schedule: a global batch, the last one cut short.

        Raises:
            ValueError: an interleaved pipeline is given fewer micro-batches than it has stages.
        """
        step = self.micro_batch_size * self.dp_size
        per_run = self.global_batch_size // step
        if self.interleaved and per_run % self.pp_size:
            raise ValueError(
                f"data.global_batch_size={self.global_batch_size} makes {per_run} micro-batches; "
                "the interleaved schedule needs a multiple of parallel."
                f"pipeline_model_parallel_size={self.pp_size}: set data.global_batch_size to a "
                f"multiple of {step * self.pp_size}"
            )
        left = -(-self.samples // step)
        if self.interleaved:
            left += -left % self.pp_size
        full, rest = divmod(left, per_run)
        return [per_run] * full + ([rest] if rest else [])


def calibration_runs(
    chunks: Sequence[HiddenGPTModel],
    groups: ParallelGroups,
    dataset: Dataset[dict[str, Tensor]],
    data: DataConfig,
    plan: Calibration,
    done: int,
) -> Iterator[list[Batch]]:
    """The micro-batches of this rank, one run of the schedule after the other.

    Args:
        chunks: this rank's part of the model.
        groups: this rank's process groups.
        dataset: at least ``plan.samples`` samples, in global order.
        data: batch sizes.
        plan: how samples are spread.
        done: runs to leave out at the beginning.
    """
    device = next(chunks[0].parameters()).device
    loader = build_dataloader(
        FirstSamples(dataset, plan.samples),
        data,
        dp_rank=plan.dp_rank,
        dp_size=plan.dp_size,
        consumed_samples=plan.done(done),
        drop_last=False,
    )
    batches = iter(loader)
    for count in plan.schedule()[done:]:
        yield [
            {key: value.to(device) for key, value in on_this_cp_rank(batch, groups).items()}
            for batch in itertools.islice(batches, count)
        ]


@contextmanager
def evaluating(chunks: Sequence[HiddenGPTModel]) -> Iterator[None]:
    """Run the body in evaluation mode."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, training in zip(chunks, modes, strict=True):
            chunk.train(training)


@contextmanager
def calibrating(chunks: Sequence[HiddenGPTModel]) -> Iterator[None]:
    """Run the body in evaluation mode and without the output layer."""
    before = [chunk.return_hidden for chunk in chunks]
    for chunk in chunks:
        chunk.return_hidden = True
    try:
        with evaluating(chunks):
            yield
    finally:
        for chunk, return_hidden in zip(chunks, before, strict=True):
            chunk.return_hidden = return_hidden

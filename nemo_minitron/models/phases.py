"""The phases of a training at work: who reads which samples when, and what a step computes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from nemo_minitron.config.phases import Phase, phase_of, samples_before
from nemo_minitron.data.blend import BlendedSamples
from nemo_minitron.data.sampler import build_dataloader
from nemo_minitron.models.schedule import Batch, StepLoader
from nemo_minitron.runtime.groups import ParallelGroups

Samples = tuple[Dataset[Batch], Dataset[Batch] | None]
"""Training and validation samples."""


@dataclass(frozen=True)
class Course:
    """The data and the settings of a training from its first step to its last.

    Attributes:
        phases: in turn.
        samples: of each phase.
        flops: operations of a step of each phase, on all ranks together; empty if not counted.
    """

    phases: Sequence[Phase]
    samples: Sequence[Samples]
    flops: Sequence[float] = ()

    def training(self, groups: ParallelGroups, done: int) -> "InTurn":
        """Return global batches of this rank that are left after ``done`` steps."""
        consumed = samples_before(self.phases, done)
        loaders = [
            _steps(phase, samples, groups, consumed=count, drop_last=True)
            for phase, (samples, _), count in zip(self.phases, self.samples, consumed, strict=True)
            if phase.end > done
        ]
        return InTurn(loaders)

    def validation(
        self, groups: ParallelGroups, done: Callable[[], int]
    ) -> "ValidationOfPhase | None":
        """Return global batches of this rank that hold the validation samples, if there are any.

        Args:
            groups: this rank's process groups.
            done: says how many steps are done.
        """
        held_out = [samples for _, samples in self.samples if samples is not None]
        if not held_out:
            return None
        loaders = [
            _steps(phase, samples, groups, consumed=0, drop_last=False)
            for phase, samples in zip(self.phases, held_out, strict=True)
        ]
        return ValidationOfPhase(self.phases, loaders, done)

    def epochs(self, step: int) -> dict[str, float]:
        """How often each source of the phase of a step was read in it, by name; maybe none."""
        index = phase_of(self.phases, step)
        train = self.samples[index][0]
        if not isinstance(train, BlendedSamples):
            return {}
        return train.epochs(samples_before(self.phases, step)[index])

    def flops_between(self, first: int, last: int) -> float:
        """Return operations of the steps after step ``first`` up to step ``last``."""
        return sum(
            phase.steps_between(first, last) * each
            for phase, each in zip(self.phases, self.flops, strict=False)
        )


def _steps(
    phase: Phase, samples: Any, groups: ParallelGroups, *, consumed: int, drop_last: bool
) -> StepLoader:
    size = groups.dp.size()
    loader = build_dataloader(
        samples,
        phase.data,
        dp_rank=groups.dp.rank(),
        dp_size=size,
        consumed_samples=consumed,
        drop_last=drop_last,
    )
    return StepLoader(loader, phase.data.global_batch_size // (phase.data.micro_batch_size * size))


class InTurn:
    """Loaders that are read one after another; without a length, as ``StepLoader`` is."""

    def __init__(self, loaders: Sequence[Iterable[list[Batch]]]) -> None:
        self.loaders = loaders

    def __iter__(self) -> Iterator[list[Batch]]:
        """All batches of the first loader, then those of the next one."""
        for loader in self.loaders:
            yield from loader


@dataclass(frozen=True)
class ValidationOfPhase:
    """The validation samples of the phase that the last step was in."""

    phases: Sequence[Phase]
    loaders: Sequence[Iterable[list[Batch]]]
    done: Callable[[], int]

    def __iter__(self) -> Iterator[list[Batch]]:
        """Iterate over the batches of the phase that the training is in."""
        return iter(self.loaders[phase_of(self.phases, max(self.done(), 1))])

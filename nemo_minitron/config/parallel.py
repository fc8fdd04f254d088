"""The layout: how one model is spread over ranks."""

import math
import re
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_minitron.config.base import ADDED


@dataclass(kw_only=True)
class ParallelConfig:
    """Degrees of parallelism, named as Megatron-Core names them."""

    tensor_model_parallel_size: int = 1
    """Ranks that every matrix is split over."""
    pipeline_model_parallel_size: int = 1
    """Ranks that the layers are split over."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per pipeline rank (interleaved schedule); null switches it off."""
    context_parallel_size: int = 1
    """Ranks that every sequence is split over."""
    expert_model_parallel_size: int = 1
    """Ranks that the experts of a mixture-of-experts layer are split over."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor-parallel ranks."""
    data_parallel_size: int | None = None
    """Model replicas. null: what the launcher's world size leaves; when started alone as few as
    the experts need, 1 without ``expert_model_parallel_size``."""
    num_layers_in_first_pipeline_stage: int | None = None
    """Layers of the first stage when stages are uneven."""
    num_layers_in_last_pipeline_stage: int | None = None
    """Layers of the last stage when stages are uneven."""
    pipeline_model_parallel_layout: str | None = None
    """Megatron's string for any other split: ``Et*3|t*4|t*4|t*2L``, one part per model chunk."""

    def __post_init__(self) -> None:
        """Check what can be checked without knowing the model."""
        for name in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "context_parallel_size",
            "expert_model_parallel_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"parallel.{name}={getattr(self, name)} must be at least 1")
        for name in (
            "data_parallel_size",
            "num_layers_in_first_pipeline_stage",
            "num_layers_in_last_pipeline_stage",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"parallel.{name}={value} must be at least 1, or null")
        vpp = self.virtual_pipeline_model_parallel_size
        if vpp is not None and (vpp < 2 or self.pipeline_model_parallel_size < 2):
            raise ValueError(
                f"parallel.virtual_pipeline_model_parallel_size={vpp} needs at least 2 chunks and "
                "parallel.pipeline_model_parallel_size of at least 2; use null to switch it off"
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise ValueError(
                "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size of at "
                "least 2; set parallel.sequence_parallel=false"
            )

        self._check_pipeline_layout()

    def _check_pipeline_layout(self) -> None:
        layout = self.pipeline_model_parallel_layout
        if layout is None:
            return
        if self.num_layers_in_first_pipeline_stage or self.num_layers_in_last_pipeline_stage:
            raise ValueError(
                f"parallel.pipeline_model_parallel_layout={layout} says where every layer goes; "
                "leave parallel.num_layers_in_first/last_pipeline_stage out"
            )
        try:
            parts = len(layers_per_chunk(layout))
        except ValueError as error:
            raise ValueError(f"parallel.{error}") from error
        chunks = self.virtual_pipeline_model_parallel_size or 1
        if parts != self.pipeline_model_parallel_size * chunks:
            raise ValueError(
                f"parallel.pipeline_model_parallel_layout={layout} has {parts} parts; parallel."
                f"pipeline_model_parallel_size={self.pipeline_model_parallel_size} x "
                f"virtual_pipeline_model_parallel_size={chunks} needs "
                f"{self.pipeline_model_parallel_size * chunks}"
            )

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model."""
        return (
            self.tensor_model_parallel_size
            * self.pipeline_model_parallel_size
            * self.context_parallel_size
        )

    @property
    def sequence_multiple(self) -> int:
        """Return the divisor of sequence lengths: context parallelism cuts two chunks per rank."""
        cp = self.context_parallel_size
        parts = 2 * cp if cp > 1 else 1
        return parts * (self.tensor_model_parallel_size if self.sequence_parallel else 1)

    def world_size(self, launched: int | None = None) -> int:
        """Return ranks in all.

        Args:
            launched: ranks the launcher (torchrun, srun) started; None when started alone.

        Raises:
            ValueError: the launcher's world size does not fit the layout.
        """
        world = self._world_size(launched)
        self._check_experts(world // self.model_parallel_size)
        return world

    def _check_experts(self, data_parallel_size: int) -> None:
        """Experts are spread over ranks that hold replicas of everything else."""
        replicas = data_parallel_size * self.context_parallel_size
        if replicas % self.expert_model_parallel_size:
            raise ValueError(
                f"parallel.expert_model_parallel_size={self.expert_model_parallel_size} must "
                f"divide data x context parallel ranks, {data_parallel_size} x "
                f"{self.context_parallel_size}; set parallel.data_parallel_size to a multiple of "
                f"{self._fewest_replicas}"
            )

    @property
    def _fewest_replicas(self) -> int:
        ep = self.expert_model_parallel_size
        return ep // math.gcd(ep, self.context_parallel_size)

    def _world_size(self, launched: int | None) -> int:
        wanted = self.model_parallel_size * (self.data_parallel_size or self._fewest_replicas)
        if launched is None:
            return wanted
        wanted = self.model_parallel_size * (self.data_parallel_size or 1)
        if launched % self.model_parallel_size or (self.data_parallel_size and launched != wanted):
            raise ValueError(
                f"the launcher started {launched} ranks but the layout (tensor x pipeline x context"
                f"{' x data' if self.data_parallel_size else ''}) needs "
                f"{'exactly' if self.data_parallel_size else 'a multiple of'} {wanted}; change the "
                "launcher or the parallel.* keys"
            )
        return launched


@dataclass(kw_only=True)
class TeacherParallelConfig:
    """Where the teacher runs: on the ranks of the student, or on ranks of its own.

    On the student's ranks it has the student's degrees, and may split its layers otherwise. On its
    own it may have any degrees, but sequences are not split (no context parallelism).
    """

    own_ranks: int = field(default=0, metadata=ADDED)
    """Ranks that run the teacher alone, the last ones of the job; 0 runs it on the student's."""
    tensor_model_parallel_size: int | None = field(default=None, metadata=ADDED)
    """The key of ``parallel``, for ``own_ranks``; null: that of the student."""
    pipeline_model_parallel_size: int | None = field(default=None, metadata=ADDED)
    """The key of ``parallel``, for ``own_ranks``; null: that of the student."""
    expert_model_parallel_size: int | None = field(default=None, metadata=ADDED)
    """The key of ``parallel``, for ``own_ranks``; null: that of the student."""
    sequence_parallel: bool | None = field(default=None, metadata=ADDED)
    """As in ``parallel``, for ``own_ranks``; null is the student's where tensors are split."""
    num_layers_in_first_pipeline_stage: int | None = None
    """The key of ``parallel``, for the teacher."""
    num_layers_in_last_pipeline_stage: int | None = None
    """The key of ``parallel``, for the teacher."""
    pipeline_model_parallel_layout: str | None = None
    """The key of ``parallel``, for the teacher."""

    def __post_init__(self) -> None:
        """Check what can be checked without knowing the student's layout."""
        if self.own_ranks < 0:
            raise ValueError(f"teacher_parallel.own_ranks={self.own_ranks} must not be negative")
        for name in (*_DEGREES, "sequence_parallel"):
            if getattr(self, name) is not None and not self.own_ranks:
                raise ValueError(
                    f"teacher_parallel.{name}={getattr(self, name)} needs ranks for the teacher "
                    "alone: set teacher_parallel.own_ranks, or leave it out (on the student's "
                    "ranks the teacher has the degrees of parallel.*)"
                )

    def of(self, student: ParallelConfig) -> ParallelConfig:
        """Return the layout of the teacher beside a student of this layout.

        Raises:
            ValueError: the split does not fit the degrees, or the degrees not ``own_ranks``.
        """
        split = {name: getattr(self, name) for name in _SPLITS}
        try:
            return self._own(student, split) if self.own_ranks else replace(student, **split)
        except ValueError as error:
            named = re.sub(r"\bparallel\.", "teacher_parallel.", str(error))
            raise ValueError(f"teacher_parallel: {named}") from error

    def _own(self, student: ParallelConfig, split: dict[str, Any]) -> ParallelConfig:
        given = {name: getattr(self, name) for name in _DEGREES}
        degrees = {k: getattr(student, k) if v is None else v for k, v in given.items()}
        split_tensors = degrees["tensor_model_parallel_size"] > 1
        sequence = self.sequence_parallel
        if sequence is None:
            sequence = student.sequence_parallel and split_tensors
        layout = ParallelConfig(**degrees, sequence_parallel=sequence, **split)
        replicas, rest = divmod(self.own_ranks, layout.model_parallel_size)
        if rest:
            raise ValueError(
                f"parallel.own_ranks={self.own_ranks} must be a multiple of tensor x pipeline "
                f"ranks, {layout.tensor_model_parallel_size} x "
                f"{layout.pipeline_model_parallel_size}"
            )
        layout = replace(layout, data_parallel_size=replicas)
        layout.world_size()
        return layout


def own_ranks(config: object) -> int:
    """Return ranks that run the teacher of a stage alone, beside those of ``parallel``."""
    where = getattr(config, "teacher_parallel", None)
    return where.own_ranks if where else 0


_DEGREES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)
_SPLITS = (
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
)


# As Megatron unrolls them (PipelineParallelLayerLayout): first (..)*n, then x*n.
_REPEATS = (r"\(([^)]+)\)\*(\d+)", r"(.)\*(\d+)")


def layers_per_chunk(layout: str) -> list[int]:
    """Decoder layers of every model chunk, in the order of the layers.

    Args:
        layout: ``Et*3|(t|)*2tL``: chunks between bars, ``E`` the embedding, ``t`` a decoder layer,
            ``L`` the output layer and loss; ``x*n`` and ``(..)*n`` repeat, commas mean nothing.

    Raises:
        ValueError: not such a string, a chunk without a layer, or E and L not at the ends.
    """
    text = layout.replace(",", "")
    for pattern in _REPEATS:
        text = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), text)
    chunks = text.split("|")
    if not re.fullmatch(r"E[t|]*L", text):
        raise ValueError(
            "pipeline_model_parallel_layout="
            f"{layout} must start with E, end with L and hold t and | between (multi-token "
            "prediction, m, is not supported)"
        )
    sizes = [chunk.count("t") for chunk in chunks]
    if 0 in sizes:
        raise ValueError(
            f"pipeline_model_parallel_layout={layout} leaves part {sizes.index(0) + 1} of "
            f"{len(sizes)} without a layer (t); give it one, or use fewer parts"
        )
    return sizes

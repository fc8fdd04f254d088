"""The one place that reads Megatron's ``parallel_state``."""

import torch.distributed as dist

from nemo_minitron.runtime.extensions import before_megatron

before_megatron()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

Group = dist.ProcessGroup


def initialised_degrees() -> dict[str, int | None]:
    """Return degrees of the initialised layout, by the names of ``ParallelConfig``.

    Raises:
        ValueError: Megatron's groups are not initialised.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise ValueError(
            "Megatron's process groups are not initialised; call megatron.core.parallel_state."
            "initialize_model_parallel first, or do this inside "
            "`with nemo_minitron.runtime.launch.distributed(ParallelConfig(...)):`"
        )
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": virtual,
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "expert_model_parallel_size": parallel_state.get_expert_model_parallel_world_size(),
    }


class ParallelGroups(ProcessGroupCollection):
    """Megatron's process groups of this rank; every collective of this package names one of them.

    ``dp`` counts batch replicas (without context parallelism); ``dp_cp`` are all ranks that hold
    the same shard of the weights; ``embd`` are the first and the last stage. Experts are spread
    over ``ep``, each split over ``expt_tp``; ``expt_dp`` are the ranks that hold the same shard of
    the same experts. ``mp`` are the ranks of one replica of all but the experts, ``tp_ep_pp``
    (tensor x expert x pipeline) those of one replica of everything.
    """

    tp: Group
    pp: Group
    cp: Group
    dp: Group
    dp_cp: Group
    ep: Group
    expt_tp: Group
    expt_dp: Group
    embd: Group | None
    mp: Group
    tp_ep_pp: Group

    @classmethod
    def current(cls) -> "ParallelGroups":
        """Return the groups of the initialised layout.

        Raises:
            ValueError: Megatron's groups are not initialised.
        """
        initialised_degrees()
        groups: ParallelGroups = cls.use_mpu_process_groups()
        return groups

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the first layers."""
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last layers and the output layer."""
        return self.pp.rank() == self.pp.size() - 1

    @property
    def last_stage_global_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pp, self.pp.size() - 1)

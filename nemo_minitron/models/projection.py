"""The trained map from student width to teacher width that intermediate losses share.

2407.14679, section 3: "a learned shared linear transformation". One matrix in meaning; a copy lives
in every model chunk that has a loss on hidden states, as tied embeddings do: the copies start
equal, take the sum of their gradients, and so stay equal. Training checkpoints hold it once;
weights for use (``models/weights.py``) leave it out.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.utils import make_sharded_tensor_for_checkpoint
from torch import Tensor

PROJECTION = "kd_projection"
"""Name of the submodule of a chunk, and so the prefix of its keys."""
_SEED = 2407


class Projection(torch.nn.Module):
    """``x W^T``, no bias.

    Attributes:
        weight: ``[H, h]`` teacher width, student width; the same on every rank.
    """

    def __init__(
        self,
        student: int,
        teacher: int,
        *,
        copy: int,
        sequence_parallel: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        """Draw the initial matrix: normal, variance 1 / h, the same whatever the layout.

        Args:
            student: student width h.
            teacher: teacher width H.
            copy: number of this copy in the whole pipeline; 0 is the one that is saved and counted.
            sequence_parallel: whether a rank sees a part of the sequence.
            dtype: of the student.
            device: of the student; None is the CPU.
        """
        super().__init__()
        generator = torch.Generator().manual_seed(_SEED)
        weight = torch.randn(teacher, student, generator=generator) / student**0.5
        self.weight = torch.nn.Parameter(weight.to(dtype).to(device))
        self.copy = copy
        parameter: Any = self.weight
        # Megatron's marks: gradients of sequence parts are summed over the tensor-parallel ranks;
        # the gradient norm counts one copy; the distributed optimizer shards all copies alike (a
        # bucket of its own), so that their gradients can be summed after the reduce-scatter.
        parameter.sequence_parallel = sequence_parallel
        parameter.shared = copy > 0
        parameter.shared_embedding = True

    def forward(self, states: Tensor) -> Tensor:
        """``[s, b, h]`` to ``[s, b, H]``."""
        return F.linear(states, self.weight)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Describe one tensor for ``dist_checkpointing``, every copy being a replica of it."""
        key = f"{prefix}weight"
        tensor = make_sharded_tensor_for_checkpoint(self.weight, key, sharded_offsets)
        _, tp, dp = tensor.replica_id
        tensor.replica_id = (self.copy, tp, dp)
        return {key: tensor}


def sum_gradients(
    copies: Sequence[Projection],
    shape: tuple[int, int],
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Give every copy the sum of the gradients of all copies (collective over the pipeline).

    Args:
        copies: those of this rank's chunks.
        shape: of the matrix, for ranks without a copy.
        group: pipeline-parallel group.
        device: of this rank.
    """
    if group.size() == 1 and len(copies) == 1:
        return
    grads: list[Tensor] = [copy.weight.main_grad for copy in copies]  # type: ignore[attr-defined]  # Megatron's DDP adds it
    # Gradient buffers are fp32 (models/optim.py, grad_reduce_in_fp32).
    total = torch.zeros(shape, dtype=torch.float32, device=device)
    for grad in grads:
        total += grad
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    for grad in grads:
        grad.copy_(total)


def without_projection(state: dict[str, Any]) -> dict[str, Any]:
    """Return a chunk's (sharded) state without the matrix, which is no part of the model."""
    return {key: value for key, value in state.items() if not is_projection(key)}


def is_projection(key: str) -> bool:
    """Whether a state-dict key belongs to the matrix."""
    return key.startswith(f"{PROJECTION}.")

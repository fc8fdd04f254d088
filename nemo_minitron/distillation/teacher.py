"""The frozen teacher: a second Megatron model on the same ranks."""

import torch
from torch import Tensor

from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import Batch, run_schedule


class Teacher:
    """Runs forward only; has no gradient buffers and no optimizer state."""

    def __init__(self, chunks: list[HiddenGPTModel]) -> None:
        self.chunks = chunks
        for chunk in chunks:
            chunk.return_hidden = True
            chunk.eval()
            chunk.requires_grad_(False)

    @torch.no_grad()
    def hidden_states(self, micro_batches: list[Batch]) -> list[Tensor]:
        """Final hidden state of every micro-batch, in order.

        Args:
            micro_batches: those of one global batch on this rank.

        Returns:
            ``[s, b, H]`` each (``[s / tp, b, H]`` under sequence parallelism) on the last stage;
            empty on the others.
        """
        return run_schedule(
            self.chunks,
            micro_batches,
            lambda index, batch, hidden: hidden,
            forward_only=True,
            collect_outputs=True,
        )

    @property
    def output_weight(self) -> Tensor:
        """``[v / tp, H]`` local rows of the output layer (last stage only)."""
        return self.chunks[-1].output_weight()

"""The frozen teacher: a second Megatron model on the same ranks."""

from contextlib import nullcontext

import torch
from torch import Tensor

from nemo_minitron.distillation.offload import HostWeights
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import Batch, run_schedule


class Teacher:
    """Runs forward only; has no gradient buffers and no optimizer state.

    With ``offload`` its weights wait in host memory between passes (see ``release``).
    """

    def __init__(self, chunks: list[HiddenGPTModel], *, offload: bool = False) -> None:
        self.chunks = chunks
        self._host = _host_weights(chunks) if offload else None
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
        with self._host.on_device() if self._host else nullcontext():
            return run_schedule(
                self.chunks,
                micro_batches,
                lambda index, batch, hidden: hidden,
                forward_only=True,
                collect_outputs=True,
            )

    def release(self) -> None:
        """Send the weights to host memory, if that is where they wait; call it once loaded."""
        if self._host:
            self._host.release()

    @property
    def output_weight(self) -> Tensor:
        """``[v / tp, H]`` local rows of the output layer (last stage only)."""
        return self.chunks[-1].output_weight()


def _host_weights(chunks: list[HiddenGPTModel]) -> HostWeights:
    """All weights but the output layer's, from which the loss makes logits after the pass."""
    weights = [parameter for chunk in chunks for parameter in chunk.parameters()]
    return HostWeights(weights, [chunk.output_weight() for chunk in chunks if chunk.post_process])

"""The Lightning strategy of a model that Megatron parallelises, with its training checkpoints."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import SingleDeviceStrategy
from megatron.core import dist_checkpointing

from nemo_minitron.checkpoint.manifest import FileEntry
from nemo_minitron.checkpoint.refuse_code import refuse_code
from nemo_minitron.checkpoint.seals import read_seal
from nemo_minitron.models.saving import Saver, hashes_by_rank, step_of
from nemo_minitron.models.weights import plain_errors
from nemo_minitron.runtime.agreement import from_first

if TYPE_CHECKING:
    from nemo_minitron.models.gpt import MinitronGPTModel

T = TypeVar("T")
STATE = "state"
"""Key of Lightning's own state in a training checkpoint."""
# Plain values only: Megatron reads them back with ``weights_only=True``. The config is not among
# them, it is in the result's ``.hydra``.
_KEPT = (
    "epoch",
    "global_step",
    "loops",
    "callbacks",
    "pytorch-lightning_version",
    "state_dict",
    "optimizer_states",
    "lr_schedulers",
)


class MegatronStrategy(SingleDeviceStrategy):
    """Lightning sees one device per process; Megatron does everything between processes.

    Training checkpoints are Megatron ``torch_dist`` folders (any layout reads them) that appear
    under their name only when complete.

    Args:
        device: of this rank.
        async_save: whether training goes on while a checkpoint is written.
        keep_every_n_steps: checkpoints of these steps are never deleted; 0 keeps none of them.
    """

    strategy_name = "megatron"

    def __init__(
        self, device: torch.device, *, async_save: bool = False, keep_every_n_steps: int = 0
    ) -> None:
        super().__init__(device=device)
        self._saver = Saver(background=async_save)
        self._keep_every = keep_every_n_steps
        self.global_rank = dist.get_rank()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self.world_size = dist.get_world_size()

    @property
    def _module(self) -> "MinitronGPTModel":
        assert self.lightning_module is not None
        return self.lightning_module

    @property
    def is_global_zero(self) -> bool:
        """Whether this is global rank 0."""
        return self.global_rank == 0

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """The optimizer must exist when its state is loaded."""
        return True

    def barrier(self, *args: object, **kwargs: object) -> None:
        """Wait for every rank."""
        dist.barrier(group=dist.group.WORLD)

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Send an object from global rank ``src`` to every rank."""
        box = [obj]
        dist.broadcast_object_list(box, src=src, group=dist.group.WORLD)
        return box[0]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return nothing: weights are saved sharded."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Return nothing: optimizer state is saved sharded."""
        return {}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: object = None
    ) -> None:
        """Write weights, optimizer, scheduler and Lightning's state to a folder (collective).

        With ``trainer.async_save`` the folder appears later, at a call of ``settle``.
        """
        state = self._module.training_state(is_loading=False)
        state[STATE] = {key: checkpoint[key] for key in _KEPT if key in checkpoint}
        self._saver.save(state, Path(filepath))

    def settle(self, *, wait: bool) -> None:
        """Let a checkpoint appear that was written beside the training (collective)."""
        self._saver.settle(wait=wait)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Look once per step whether a checkpoint that is being written is complete."""
        self.settle(wait=False)

    def on_train_end(self) -> None:
        """Wait until the last checkpoint is written."""
        self.settle(wait=True)

    def _check(self, folder: Path) -> None:
        """Refuse a damaged checkpoint, on all ranks together."""
        seal: dict[str, FileEntry] = from_first(partial(read_seal, folder))
        if not seal:
            return  # by an earlier version
        found = hashes_by_rank(folder)
        for name, entry in seal.items():
            if found.get(name) != entry:
                raise ValueError(
                    f"{folder / name} is damaged: it is not what was written; remove {folder}, "
                    "then training goes on from the checkpoint before it, or starts over"
                )

    def load_checkpoint(self, checkpoint_path: str | Path) -> dict[str, Any]:
        """Load weights, optimizer and scheduler in place; returns Lightning's state."""
        loaded = self.read_checkpoint(Path(checkpoint_path))
        self._module.load_training_state(loaded)
        lightning: dict[str, Any] = loaded[STATE]
        return lightning

    def read_checkpoint(self, path: Path) -> dict[str, Any]:
        """Read what ``save_checkpoint`` wrote, at this layout; tensors may be the model's own."""
        self._check(path)
        refuse_code(path)
        self._module.check_training_checkpoint(path)
        state = self._module.training_state(is_loading=True)
        with plain_errors(path):
            loaded: dict[str, Any] = dist_checkpointing.load(state, str(path))
        return loaded

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Do nothing: ``load_checkpoint`` has loaded all of it."""

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Do nothing: ``load_checkpoint`` has loaded all of it."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a training checkpoint, unless it is one of every ``keep_every_n_steps``."""
        path = Path(filepath)
        if not (self._keep_every and step_of(path) % self._keep_every == 0):
            self._saver.remove(path)

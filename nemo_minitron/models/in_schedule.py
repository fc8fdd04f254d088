"""Distillation inside a schedule that another program runs: teacher pass and loss function."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.build import unwrap
from nemo_minitron.models.found import config_of
from nemo_minitron.models.hidden import output_weight
from nemo_minitron.models.objective import ResidentTeacher, micro_batch_loss
from nemo_minitron.models.prune_check import agreed
from nemo_minitron.models.schedule import output_of
from nemo_minitron.models.teacher import Teacher
from nemo_minitron.runtime.groups import ParallelGroups

MicroBatch = dict[str, Any]
"""``tokens``, ``position_ids``, ``labels`` and ``loss_mask``, ``[b, s]`` each."""
Loss = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]


class Distillation:
    """A frozen teacher, and the loss of a student inside Megatron's schedule.

    For every global batch call ``prepare`` on every rank, then run the schedule over the same
    micro-batches with a ``forward_step`` that returns what ``forward_step`` here returns.
    """

    def __init__(
        self,
        teacher: Sequence[nn.Module],
        student: Sequence[nn.Module],
        *,
        vocab_size: int | None = None,
        settings: DistillationConfig | None = None,
    ) -> None:
        """Take two models on the same ranks, each with its own depth, width and layer split.

        Args:
            teacher: this rank's part of the teacher, which is frozen from now on.
            student: this rank's part of the student, wrapped for training or not.
            vocab_size: true vocabulary, where the models' is padded.
            settings: the losses; None is the forward KL divergence of the logits alone.

        Raises:
            ValueError: the vocabularies differ, or a setting is not supported here.
        """
        self._groups = ParallelGroups.current()
        self._settings = settings or DistillationConfig()
        frozen, bare = [unwrap(chunk) for chunk in teacher], unwrap(student[0])
        agreed(partial(_check_pair, frozen[0], bare, self._settings, vocab_size))
        self._vocab_size = vocab_size or config_of(bare).vocab_size
        self._objective = ResidentTeacher(
            Teacher(frozen, offload=self._settings.offload_teacher), None
        )
        self._done = 0

    def prepare(
        self, micro_batches: Sequence[MicroBatch], shape: tuple[int, int] | None = None
    ) -> None:
        """Run the teacher over a global batch (collective); the student's schedule comes next.

        Args:
            micro_batches: those of this rank, with ``tokens``, ``position_ids``, ``labels`` and
                ``loss_mask`` (``attention_mask`` if the models read one), ``[b, s]`` each. A stage
                may have None in place of what it does not read.
            shape: ``(b, s)``, where ``tokens`` are None on this stage.
        """
        self._objective.shape = shape
        self._objective.prepare(list(micro_batches), train=True)
        self._done = 0

    def forward_step(self, batch: MicroBatch, model: nn.Module) -> tuple[Tensor, Loss]:
        """Run a chunk of the student on a micro-batch.

        Returns:
            What Megatron's schedule wants of a ``forward_step``: the chunk's output, and the
            function that makes of it the summed loss, the number of target tokens, and sums and
            tokens of what is logged.
        """
        chunk: Any = unwrap(model)
        before = getattr(chunk, "return_hidden", False)
        chunk.return_hidden = True
        try:
            output = output_of(model, batch)
        finally:
            chunk.return_hidden = before
        return output, partial(self._loss, model, batch)

    def _loss(
        self, model: nn.Module, batch: MicroBatch, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The schedule calls it on the last stage, in the order of the micro-batches."""
        index, self._done = self._done, self._done + 1
        targets = self._objective.targets(index, batch, keep=False)
        rows = output_weight(unwrap(model)).size(0)
        shard = VocabShard(self._groups.tp, self._vocab_size, rows)
        total, sums = micro_batch_loss(model, batch, hidden, targets, self._settings, shard)
        logged = {"distillation loss": torch.stack([sums.kd, sums.tokens]).detach()}
        if self._settings.ce_weight:
            logged["lm loss"] = torch.stack([sums.ce, sums.tokens]).detach()
        return total, sums.tokens.int(), logged


def _check_pair(
    teacher: Any, student: Any, settings: DistillationConfig, vocab_size: int | None
) -> None:
    sizes = [config_of(chunk).vocab_size for chunk in (teacher, student)]
    if sizes[0] != sizes[1] and vocab_size is None:
        raise ValueError(
            f"the teacher has vocab_size={sizes[0]} and the student {sizes[1]}; logits can be "
            "compared only where both have the same tokens; give vocab_size where one is padded"
        )
    if settings.intermediate.losses:
        raise ValueError(
            f"intermediate losses ({settings.intermediate.losses}) train a projection of their "
            "own; use minitron distill for them"
        )
    if not student.config.calculate_per_token_loss:
        raise ValueError(
            "calculate_per_token_loss=false of the student's TransformerConfig would weigh "
            "micro-batches, not tokens, and the loss would depend on the layout; set it to true"
        )

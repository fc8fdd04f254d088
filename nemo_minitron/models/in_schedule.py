"""Distillation inside a schedule that another program runs: teacher pass and loss function."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.build import unwrap
from nemo_minitron.models.found import config_of
from nemo_minitron.models.hidden import output_weight
from nemo_minitron.models.objective import micro_batch_loss, teacher_states
from nemo_minitron.models.schedule import output_of
from nemo_minitron.models.teacher import Teacher
from nemo_minitron.runtime.agreement import agreed
from nemo_minitron.runtime.groups import ParallelGroups

MicroBatch = dict[str, Any]
"""``tokens``, ``position_ids``, ``labels`` and ``loss_mask``, ``[b, s]`` each."""
Loss = Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]
Edge = dist.ProcessGroup | None


class Distillation:
    """A frozen teacher, and the loss of a student inside Megatron's schedule.

    The schedule's ``forward_step`` returns what ``forward_step`` here returns. Wherever a chunk of
    the student runs, the teacher's chunk of that stage runs before it on the same micro-batch.
    """

    def __init__(
        self,
        teacher: Sequence[nn.Module],
        student: Sequence[nn.Module],
        *,
        vocab_size: int | None = None,
        settings: DistillationConfig | None = None,
    ) -> None:
        """Take two models on the same ranks (collective), each with its own depth and width.

        Args:
            teacher: this rank's part of the teacher, which is frozen from now on.
            student: this rank's part of the student, wrapped for training or not.
            vocab_size: true vocabulary, where the models' is padded.
            settings: the losses; None is the forward KL divergence of the logits alone.

        Raises:
            ValueError: the vocabularies or the numbers of chunks differ, or a setting is not
                supported here.
        """
        self._groups = ParallelGroups.current()
        self._settings = settings or DistillationConfig()
        frozen, bare = ([unwrap(chunk) for chunk in model] for model in (teacher, student))
        agreed(partial(_check_pair, frozen, bare, self._settings, vocab_size))
        self._vocab_size = vocab_size or config_of(bare[0]).vocab_size
        self._teacher = Teacher(frozen)
        on = next(frozen[0].parameters()).device
        self._before, self._after = _edges(self._groups.pp, on)
        self._sent: list[tuple[dist.Work, Tensor]] = []

    def forward_step(self, batch: MicroBatch, model: nn.Module) -> tuple[Tensor, Loss]:
        """Run a chunk of the teacher, then the student's, on a micro-batch.

        Args:
            batch: ``tokens``, ``position_ids``, ``labels`` and ``loss_mask`` (``attention_mask`` if
                the models read one), ``[b, s]`` each, local to the context-parallel rank. A stage
                may have None in place of what it does not read.
            model: this rank's chunk of the student, wrapped for training or not.

        Returns:
            What Megatron's schedule wants of a ``forward_step``: the chunk's output, and the
            function that makes of it the summed loss, the number of target tokens, and sums and
            tokens of what is logged.
        """
        chunk: Any = unwrap(model)
        states = self._teacher_pass(chunk, batch)
        before = getattr(chunk, "return_hidden", False)
        chunk.return_hidden = True
        try:
            output = output_of(model, batch)
        finally:
            chunk.return_hidden = before
        return output, partial(self._loss, model, batch, states)

    @torch.no_grad()
    def _teacher_pass(self, student: Any, batch: MicroBatch) -> Tensor:
        """Return the output ``[s, b, H]`` of the teacher's chunk at a student chunk's stage.

        A stage runs a micro-batch after the one before it has, so its states are on their way.
        """
        chunk: Any = self._teacher.chunks[getattr(student, "vp_stage", None) or 0]
        dtype, pp = chunk.config.pipeline_dtype, self._groups.pp
        if not chunk.pre_process:
            s, b, _ = student.decoder.input_tensor.shape
            if student.config.sequence_parallel != chunk.config.sequence_parallel:
                tp = self._groups.tp.size()
                s = s * tp if student.config.sequence_parallel else s // tp
            states = student.decoder.input_tensor.new_empty(
                s, b, chunk.config.hidden_size, dtype=dtype
            )
            dist.recv(states, _neighbour(pp, -1), self._before)
            chunk.set_input_tensor(states)
        output = output_of(chunk, batch)
        if not chunk.post_process:
            output = output.to(dtype).contiguous()
            work = dist.isend(output, _neighbour(pp, 1), self._after)
            assert work is not None  # this rank is in the group
            # Memory must stay until it is sent.
            self._sent = [(w, t) for w, t in self._sent if not w.is_completed()]
            self._sent.append((work, output))
        return output

    def _loss(
        self, model: nn.Module, batch: MicroBatch, states: Tensor, hidden: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the loss of a micro-batch; the schedule calls this on the last stage."""
        teacher = self._teacher
        targets = teacher_states(teacher, states)
        shard = VocabShard(self._groups.tp, self._vocab_size, output_weight(unwrap(model)).size(0))
        total, sums = micro_batch_loss(model, batch, hidden, targets, self._settings, shard)
        logged = {"distillation loss": torch.stack([sums.kd, sums.tokens]).detach()}
        if self._settings.ce_weight:
            logged["lm loss"] = torch.stack([sums.ce, sums.tokens]).detach()
        return total, sums.tokens.int(), logged


def _neighbour(pp: dist.ProcessGroup, distance: int) -> int:
    """Return the global rank of a stage in the ring of the pipeline."""
    return dist.get_global_rank(pp, (pp.rank() + distance) % pp.size())


def _edges(pp: dist.ProcessGroup, device: torch.device) -> tuple[Edge, Edge]:
    """Make groups with the stage before this one and with the one after it (collective).

    NCCL runs what one communicator is given one after another, and a send ends when it is received.
    Where both directions of a pair share one, or several pairs do, each of the ranks may have to
    receive what stands behind a send of its own. So every edge of the ring has a communicator.
    """
    mine = dist.get_process_group_ranks(pp)
    if len(mine) == 1:
        return None, None
    pipelines = [mine] * dist.get_world_size()
    dist.all_gather_object(pipelines, mine, group=dist.group.WORLD)
    edges: dict[tuple[int, int], dist.ProcessGroup] = {}
    for stages in sorted(set(map(tuple, pipelines))):
        for edge in zip(stages, (*stages[1:], stages[0]), strict=True):
            # A call of all ranks: names that torch before 2.14 gives groups whose members alone
            # make them depend on how many groups each of these has seen.
            edges[edge] = cast("dist.ProcessGroup", dist.new_group(edge))
    me, previous, following = dist.get_rank(), _neighbour(pp, -1), _neighbour(pp, 1)
    before, after = edges[previous, me], edges[me, following]
    # NCCL connects at the first message, and both ranks wait. In the schedule the receiver may be
    # waiting for the student's stage before, which comes after the teacher's. Even stages begin
    # with the stage after them and odd ones with the one before, so all edges connect at once.
    word = torch.zeros(1, device=device)
    meetings: list[Callable[[], object]] = [
        partial(dist.send, word, following, after),
        partial(dist.recv, word, previous, before),
    ]
    for meet in meetings if pp.rank() % 2 == 0 else reversed(meetings):
        meet()
    return before, after


def _waits(config: Any) -> bool:
    """Whether the schedule waits for the device, the teacher's sends included, at each exchange."""
    return bool(torch.cuda.is_available() and config.batch_p2p_comm and config.batch_p2p_sync)


def _check_pair(
    teacher: Sequence[Any],
    student: Sequence[Any],
    settings: DistillationConfig,
    vocab_size: int | None,
) -> None:
    if len(teacher) != len(student):
        raise ValueError(
            f"the teacher has {len(teacher)} chunks on this rank and the student {len(student)}; "
            "give both as many virtual pipeline stages"
        )
    sizes = [config_of(model[0]).vocab_size for model in (teacher, student)]
    if sizes[0] != sizes[1] and vocab_size is None:
        raise ValueError(
            f"the teacher has vocab_size={sizes[0]} and the student {sizes[1]}; logits can be "
            "compared only where both have the same tokens; give vocab_size where one is padded"
        )
    if vocab_size is not None and not 1 <= vocab_size <= min(sizes):
        raise ValueError(
            f"vocab_size={vocab_size} must be from 1 to {min(sizes)}, the tokens of both models"
        )
    settings.check_vocabulary(vocab_size or sizes[1])
    if settings.intermediate.losses:
        raise ValueError(
            f"intermediate losses ({settings.intermediate.losses}) train a projection of their "
            "own; use minitron distill for them"
        )
    if settings.offload_teacher:
        raise ValueError(
            "offload_teacher=true would move the teacher's weights for every micro-batch; set it "
            "to false, or use minitron distill, which runs the teacher on a whole global batch"
        )
    if not student[0].config.calculate_per_token_loss:
        raise ValueError(
            "calculate_per_token_loss=false of the student's TransformerConfig would weigh "
            "micro-batches, not tokens, and the loss would depend on the layout; set it to true"
        )
    if student[0].config.fp16:
        raise ValueError(
            "fp16=true of the student's TransformerConfig is not supported: gradients of the "
            "losses exist before Megatron scales the loss, and would be lost; use bf16"
        )
    if len(student) > 1 and _waits(student[0].config):
        raise ValueError(
            "batch_p2p_sync=true of the student's TransformerConfig would make stages of the "
            "interleaved schedule wait for each other's teacher for ever; set it to false, or "
            "overlap_p2p_comm=true with batch_p2p_comm=false"
        )

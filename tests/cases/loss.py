"""Tasks for the rank pool: distillation losses on vocabulary shards."""

import torch.distributed as dist
from torch import Tensor

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.distillation.logit_loss import TeacherStates, logit_loss
from nemo_minitron.distillation.top_k import TopKTargets
from nemo_minitron.distillation.vocab import VocabShard
from tests.helpers.losses import KINDS, loss_keys, problem, stored_targets


def config_of(kind: str) -> DistillationConfig:
    """Both losses, in chunks that do not divide the tokens."""
    keys = {"chunk_size": 13, "ce_weight": 0.5, "kd_weight": 0.7, **loss_keys(kind)}
    return DistillationConfig(**keys)


def sharded_losses(vocabularies: list[int]) -> dict[tuple[int, str], list[Tensor]]:
    """Every kind on every vocabulary, all ranks in one tensor-parallel group.

    Returns:
        ``(vocabulary, kind)`` -> ``[KD, CE]``, gradient of the hidden state and of the local rows
        of the weight. Kind ``stored_<kind>`` reads stored targets.
    """
    found = {}
    for vocab in vocabularies:
        for kind in KINDS:
            found[vocab, kind] = _run(vocab, kind, stored=False)
            if KINDS[kind].get("top_k"):
                found[vocab, f"stored_{kind}"] = _run(vocab, kind, stored=True)
    return found


def _run(vocab: int, kind: str, *, stored: bool) -> list[Tensor]:
    size, config = dist.get_world_size(), config_of(kind)
    inputs = problem(vocab, rows=-(-vocab // size) * size)
    if not stored:
        return run_loss(inputs, vocab, config)
    assert config.top_k is not None
    targets = stored_targets(inputs, vocab, config.top_k, config.temperature)
    return run_loss(inputs, vocab, config, targets)


def run_loss(
    inputs: dict[str, Tensor],
    vocab: int,
    config: DistillationConfig,
    stored: TopKTargets | None = None,
) -> list[Tensor]:
    """``[KD, CE]`` and the gradients of half the loss by hidden state and local rows of the weight.

    Args:
        inputs: of ``tests.helpers.losses.problem``, weights with a multiple of TP rows.
        vocab: true vocabulary.
        config: the loss.
        stored: instead of the teacher's hidden state and weight.
    """
    group = dist.group.WORLD
    assert group is not None
    shard = VocabShard(group, vocab, inputs["weight"].size(0) // group.size())
    mine = slice(shard.start, shard.start + shard.rows)
    hidden = inputs["hidden"].clone().requires_grad_()
    weight = inputs["weight"][mine].clone().requires_grad_()
    teacher = stored or TeacherStates(inputs["teacher_hidden"], inputs["teacher_weight"][mine])
    labels, mask = inputs["labels"], inputs["mask"]
    total, parts = logit_loss(hidden, weight, labels, mask, config, shard, teacher)
    (total / 2).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [parts, hidden.grad, weight.grad]

"""Megatron-LM's ``pretrain_gpt.py``, with scoring, pruning and distillation added by arguments.

Megatron-LM (core 0.19) is unchanged: put its folder on PYTHONPATH and start this in place of
``pretrain_gpt.py``, with the same arguments and those of ``add_arguments``.
"""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pretrain_gpt as stock
import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model
from megatron.training import checkpointing as checkpoints
from megatron.training import get_args, get_tokenizer, global_vars, inprocess_restart, training
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from nemo_minitron import Distillation, make_plan, prune, score

SIZES = ["num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels"]
SIZES += ["num_query_groups", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"]
DATA = stock.train_valid_test_datasets_provider
HELD: dict[str, Any] = {}
"""The model, as the training loop has it, and what distils it."""


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """What this script knows beside Megatron-LM."""
    parser.add_argument("--minitron-targets", nargs="+", default=[], metavar="SIZE=VALUE")
    parser.add_argument("--minitron-save", help="folder for the checkpoint of the pruned model")
    parser.add_argument("--minitron-teacher", help="checkpoint of Megatron-LM to distil from")
    return parser


def with_teacher(args: Namespace, chunks: list[Any]) -> list[Any]:
    """Build the teacher that a checkpoint holds, before the student is wrapped for training."""
    theirs = Namespace(**{**vars(args), **dict.fromkeys(SIZES), "finetune": True})
    checkpoints.load_args_from_checkpoint(theirs, load_arg="minitron_teacher")
    config = gpt_config_from_args(theirs)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    teacher = config.get_builder_cls()(config).build_distributed_models(groups, wrap_with_ddp=False)
    global_vars.set_args(theirs)
    checkpoints.load_checkpoint(teacher, None, None, load_arg="minitron_teacher")
    global_vars.set_args(args)
    HELD["distillation"] = Distillation(teacher, chunks, vocab_size=get_tokenizer().vocab_size)
    return chunks


def distil_step(data_iterator: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """The stock ``forward_step`` with the teacher, and with the loss of the distillation."""
    fields = stock.get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
    batch = dict(zip(stock.BATCH_KEYS, fields, strict=True))
    if batch["cu_seqlens"] is not None:
        raise ValueError("packed sequences cannot be distilled; leave out --sft")
    output, loss = HELD["distillation"].forward_step(batch, model)
    return output, partial(checked, loss)


def checked(loss: Any, output: torch.Tensor) -> Any:
    """As ``loss_func`` of ``pretrain_gpt.py`` does for ``--check-for-nan-in-loss-and-grad``."""
    result = loss(output)
    if get_args().check_for_nan_in_loss_and_grad:
        check = partial(get_rerun_state_machine().validate_result, tolerance=0.0, fatal=True)
        check(result=result[0], rejection_func=torch.isnan, message="NaN in the loss")
    return result


def compress(args: Namespace, chunks: list[Any]) -> None:
    """Score in the loop that evaluates ``--eval-iters`` batches, prune, and save as a release."""
    args.iteration = args.consumed_valid_samples = 0
    _, samples, _ = training.build_train_valid_test_data_iterators(DATA)
    with score(chunks) as scores:
        training.evaluate(stock.forward_step, samples, chunks, None, get_model_config(chunks[0]))
    targets = {n: int(size) for n, size in (t.split("=") for t in args.minitron_targets)}
    plan = make_plan(scores, targets)
    small = prune(unwrap_model(chunks), plan)
    args.save, args.async_save = args.minitron_save, False
    vars(args).update({name: getattr(small[0].config, name) for name in SIZES})
    args.num_experts = small[0].config.num_moe_experts
    checkpoints.save_checkpoint(0, small, None, None, 0, release=True,
        preprocess_common_state_dict_fn=training.preprocess_common_state_dict)  # fmt: skip
    if args.rank == 0:
        scores.save(Path(args.save))
        plan.save(Path(args.save))


if __name__ == "__main__":
    DATA.is_distributed = True
    pretrain, store = inprocess_restart.maybe_wrap_for_inprocess_restart(training.pretrain)
    defaults = {"tokenizer_type": "GPT2BPETokenizer"}
    args = parse_and_validate_args(add_arguments, args_defaults=defaults)
    model = gpt_config_from_args(args)
    model.post_wrap_hooks.append(lambda chunks: HELD.setdefault("model", chunks))
    if args.minitron_teacher:
        model.pre_wrap_hooks.append(partial(with_teacher, args))
    config = pretrain_cfg_container_from_args(args, model)
    step = distil_step if args.minitron_teacher else stock.forward_step
    pretrain(config, DATA, ModelType.encoder_or_decoder, step, store=store,
             get_embedding_ranks=stock.get_embedding_ranks)  # fmt: skip
    if args.minitron_targets:
        compress(args, HELD["model"])

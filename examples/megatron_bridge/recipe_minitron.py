"""A recipe of Megatron-Bridge with scoring, pruning and distillation, by its callbacks and hooks.

Megatron-Bridge (0.6) is unchanged. What follows the arguments of ``main`` overrides the recipe, as
in Megatron-Bridge's own ``run_recipe.py``.
"""

from argparse import ArgumentParser
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from megatron.bridge import recipes
from megatron.bridge.models.model_provider import ModelParallelKwargs
from megatron.bridge.training import callbacks, gpt_step, model_load_save
from megatron.bridge.training.pretrain import pretrain
from megatron.bridge.training.state import GlobalState
from megatron.bridge.training.utils.flop_utils import get_model_chunk_vp_stage
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from megatron.bridge.training.utils.pg_utils import get_pg_collection
from megatron.core.utils import unwrap_model

from nemo_minitron import Distillation, make_plan, prune, score

FIELDS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")


class Compress(callbacks.Callback):
    """Scores the model while it is evaluated, prunes it, and saves what is left of it."""

    def __init__(self, targets: dict[str, int], folder: Path) -> None:
        self.targets, self.folder, self.scoring = targets, folder, ExitStack()

    def on_eval_start(self, context: callbacks.CallbackContext) -> None:
        """Look at the passes that follow."""
        self.scores = self.scoring.enter_context(score(context.model))

    def on_eval_end(self, context: callbacks.CallbackContext) -> None:
        """Choose what to keep, and keep it."""
        self.scoring.close()
        plan = make_plan(self.scores, self.targets)
        small = prune(unwrap_model(context.model), plan)
        model_load_save.save_megatron_model(small, self.folder)
        if torch.distributed.get_rank() == 0:
            self.scores.save(self.folder)
            plan.save(self.folder)
        context.state.train_state.do_test = False  # its layers are empty from now on


class Distil:
    """A teacher beside the model, and the ``forward_step`` that has it."""

    def __init__(self, config: Any, teacher: str) -> None:
        self.config, self.teacher = config, teacher
        config.model.register_pre_wrap_hook(self.build)

    def build(self, chunks: list[Any]) -> list[Any]:
        """Load the teacher when the model is there and not yet wrapped for training."""
        model = self.config.model
        layout = {name: getattr(model, name) for name in ModelParallelKwargs.__annotations__}
        teacher = model_load_save.load_megatron_model(self.teacher, mp_overrides=layout)
        self.distillation = Distillation(teacher, chunks, vocab_size=model.vocab_size)
        return chunks

    def __call__(self, state: GlobalState, data_iterator: Any, model: Any) -> Any:
        """Run a micro-batch, as ``gpt_step.forward_step`` does."""
        place = {"pg_collection": get_pg_collection(model)}
        place["vp_stage"] = get_model_chunk_vp_stage(model)
        *batch, packed = gpt_step.get_batch(data_iterator, state.cfg, **place)
        if packed is not None:
            raise ValueError("packed sequences cannot be distilled; take a dataset without them")
        return self.distillation.forward_step(dict(zip(FIELDS, batch, strict=True)), model)


def main() -> None:
    """Run the recipe: pruned if there are targets, distilled if there is a teacher."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True, help="a name in megatron.bridge.recipes")
    parser.add_argument("--targets", nargs="+", metavar="SIZE=VALUE", help="prune to these sizes")
    parser.add_argument("--save-pruned", type=Path, help="folder for the pruned model")
    parser.add_argument("--student", help="iter_ folder of a pruned model to distil")
    parser.add_argument("--teacher", help="iter_ folder of the model to distil from")
    known, overrides = parser.parse_known_args()
    config = getattr(recipes, known.recipe)()
    if known.student:
        config.model, _ = model_load_save.load_model_config(known.student)
        config.checkpoint.pretrained_checkpoint = known.student
        if config.model.should_pad_vocab:  # it came from the tokenizer, and comes from it again
            config.model.vocab_size = None
    process_config_with_overrides(config, cli_overrides=overrides)
    if known.targets:
        config.validation.skip_train, config.checkpoint.load_optim = True, False
        targets = {name: int(size) for name, size in (t.split("=") for t in known.targets)}
        pretrain(config, gpt_step.forward_step, [Compress(targets, known.save_pruned)])
    else:
        pretrain(config, Distil(config, known.teacher) if known.teacher else gpt_step.forward_step)


if __name__ == "__main__":
    main()

"""Runs scripts that train with Megatron-Bridge where there is no GPU.

    python -m tests.helpers.megatron_bridge RANKS KEPT SCRIPT ARGUMENTS...

``MEGATRON_BRIDGE`` is a folder on the path of this process alone, since Megatron-Bridge asks for
other versions than this package:

    pip install --no-deps --target FOLDER megatron-bridge==0.6.2 transformers==5.12.1 \
        "tokenizers<=0.23.0" "huggingface-hub<2" nvidia-modelopt==0.47.0

Megatron-Bridge itself and the script are as they are. What every rank reads and computes is written
to the folder KEPT: micro-batches, and for each training step its losses and gradients.
"""

import abc
import importlib.abc
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Sequence
from typing import Any

from tests.helpers.megatron_lm import Keep, install, run_ranks

ABSENT = ("nvidia_resiliency_ext", "megatron.energon", "diffusers", "pulp")
"""Imported by Megatron-Bridge or ModelOpt, and of no use to a GPT model in a small run."""


class _Kind(abc.ABCMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (_Absent,), {})


class _Absent(metaclass=_Kind):
    """A class of a package that is not there: can be imported, subclassed and used to decorate."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent()


class _Module(types.ModuleType):
    __path__: list[str] = []
    __version__ = "99.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kind(name, (_Absent,), {"__module__": self.__name__})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not installed."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if any(f"{name}.".startswith(f"{known}.") for known in self.names):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _recipe() -> Any:
    """The recipe that is closest to Megatron-LM's defaults, small and without CUDA's kernels."""
    from megatron.bridge.models.gpt_provider import local_layer_spec
    from megatron.bridge.recipes.gpt.vanilla_gpt import vanilla_gpt_pretrain_config
    from torch.nn.functional import silu

    config = vanilla_gpt_pretrain_config()
    model: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 160,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "kv_channels": 8,
        "seq_length": 32,
        "make_vocab_size_divisible_by": 64,
        "normalization": "RMSNorm",
        "activation_func": silu,
        "gated_linear_unit": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "calculate_per_token_loss": True,
        # From here on: Transformer Engine, apex and fused kernels are not there.
        "transformer_layer_spec": local_layer_spec,
        "persist_layer_norm": False,
        "apply_rope_fusion": False,
    }
    fused = "gradient_accumulation masked_softmax cross_entropy_loss bias_activation bias_dropout"
    for name, value in (model | {f"{name}_fusion": False for name in fused.split()}).items():
        setattr(config.model, name, value)
    config.mixed_precision = None
    config.optimizer.bf16 = False
    config.dist.distributed_backend = "gloo"
    config.dataset.num_workers = 0
    return config


def _kept_batches(kept: list[Any]) -> None:
    """Keep every micro-batch that ``gpt_step.get_batch`` returns."""
    from megatron.bridge.training import gpt_step

    own = gpt_step.get_batch

    def get_batch(*args: Any, **kwargs: Any) -> Any:
        fields = own(*args, **kwargs)
        names = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
        kept.append(dict(zip(names, fields, strict=False)))
        return fields

    gpt_step.get_batch = get_batch


def _kept_steps(kept: list[Any]) -> None:
    """Keep losses and gradients of every step, by a callback beside those of the script."""
    from megatron.bridge.training import pretrain as module
    from megatron.bridge.training.callbacks import Callback, CallbackContext

    class Keeper(Callback):
        def on_train_step_end(self, context: CallbackContext) -> None:
            parameters = context.model[0].named_parameters()
            gradients = {n.removeprefix("module."): p.main_grad.clone() for n, p in parameters}
            kept.append({"losses": context.loss_dict, "gradients": gradients})

    own = module.pretrain
    module.pretrain = lambda config, step, given=(): own(config, step, [*given, Keeper()])


def main(ranks: int, folder: str, arguments: Sequence[str]) -> int:
    """The exit code of a script of Megatron-Bridge."""
    install(os.environ["MEGATRON_BRIDGE"])
    warnings.simplefilter("ignore")
    sys.meta_path.append(_Finder(ABSENT))
    # Both look for Transformer Engine and do well without; Megatron-Bridge does not.
    import megatron.core.optimizer  # noqa: F401
    import modelopt.torch.distill.plugins.megatron  # noqa: F401

    sys.meta_path.append(_Finder(["transformer_engine"]))
    from megatron.bridge import recipes

    recipes.small_cpu_config = _recipe
    batches: list[Any] = []
    steps: list[Any] = []
    _kept_batches(batches)
    _kept_steps(steps)
    return run_ranks(ranks, arguments, Keep(folder, {"batches": batches, "steps": steps}))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))

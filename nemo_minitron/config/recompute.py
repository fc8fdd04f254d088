"""Activation recomputation: which of Megatron's settings fit which model. Imports no torch."""

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.pipeline_layout import layers_per_chunk
from nemo_minitron.config.training import TrainerConfig

RECOMPUTE_KEYS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)


def recompute_settings(trainer: TrainerConfig) -> dict[str, object]:
    """The keyword arguments of Megatron's ``TransformerConfig``."""
    return {key: getattr(trainer, key) for key in RECOMPUTE_KEYS}


def check_recompute(trainer: TrainerConfig, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Refuse settings that this model, split like this, cannot take.

    Megatron itself accepts some of them and then fails in the first step (``uniform`` runs past
    the last layer of a stage) or recomputes nothing (``mlp`` where there are only experts).

    Raises:
        ValueError: names the key, the model's size and the values that fit.
    """
    moe = model.num_moe_experts is not None
    absent = "mlp" if moe else "moe"
    if absent in (trainer.recompute_modules or ()):
        raise ValueError(
            f"trainer.recompute_modules names {absent}, but the layers of family '{model.family}' "
            f"{'are all experts: use moe' if moe else 'have no experts: use mlp'}"
        )
    layers, chunk = trainer.recompute_num_layers, _layers_per_chunk(model, parallel)
    if layers is None:
        return
    if trainer.recompute_method == "block" and layers > max(chunk):
        raise ValueError(
            f"trainer.recompute_num_layers={layers} is more than the {max(chunk)} layers of a "
            "pipeline stage (model chunk); make it smaller"
        )
    if trainer.recompute_method == "uniform" and any(size % layers for size in chunk):
        sizes = ", ".join(map(str, sorted(chunk)))
        raise ValueError(
            f"trainer.recompute_num_layers={layers} must divide the layers of every pipeline stage "
            f"(model chunk), here {sizes}; 1 always does"
        )


def _layers_per_chunk(model: ModelConfig, parallel: ParallelConfig) -> set[int]:
    """The different numbers of layers of the model chunks (of a layout that fits the model)."""
    if parallel.pipeline_model_parallel_layout is not None:
        return set(layers_per_chunk(parallel.pipeline_model_parallel_layout))
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    ends = (
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    )
    named = [size for size in ends if size is not None]
    stages = parallel.pipeline_model_parallel_size - len(named)
    sizes = {size // chunks for size in named}
    if stages:
        sizes.add((model.num_layers - sum(named)) // (stages * chunks))
    return sizes

"""Activation recomputation: which of Megatron's settings fit which model. Imports no torch."""

from nemo_minitron.config.layout import layers_of_stages
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import RECOMPUTE_KEYS, TrainerConfig


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
    layers = trainer.recompute_num_layers
    chunk = {size for sizes in layers_of_stages(model, parallel) for size in sizes}
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

"""Sizes of experts that not every program can multiply."""

import logging

from nemo_minitron.config.model import ModelConfig

log = logging.getLogger(__name__)

# torch's grouped matrix product, with which transformers runs all experts at once, wants the rows
# of both matrices of an expert to be whole multiples of this.
_ROW_BYTES = 16
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# The shared expert is multiplied on its own, at any width.
_SIZES = ("hidden_size", "moe_ffn_hidden_size")


def warn_of_expert_sizes(config: ModelConfig) -> list[str]:
    """Say which sizes keep transformers from running the experts of a model as it does by default.

    Args:
        config: the model, as it will be exported.

    Returns:
        What was said, a sentence a size; nothing where all is well or there are no experts.
    """
    if not config.num_moe_experts:
        return []
    step = _ROW_BYTES // _BYTES.get(config.dtype, 4)
    found = [
        f"{name}={getattr(config, name)} is no multiple of {step} ({_ROW_BYTES} bytes of "
        f"{config.dtype}): transformers runs the exported experts only with "
        'experts_implementation="eager", slower; take the nearest multiple'
        for name in _SIZES
        if getattr(config, name) % step
    ]
    for line in found:
        log.warning(line)
    return found

"""Rotary frequencies that Megatron-Core's RotaryEmbedding does not compute as transformers does."""

import math
from typing import Any

import torch
from torch import Tensor

from nemo_minitron.config.model import ModelConfig


def frequencies(config: ModelConfig) -> Tensor | None:
    """Return ``[d / 2]`` fp32 frequencies of linear scaling and of YaRN.

    With a base of its own for layers with windows, ``[d]``: theirs after those of the others
    (``models.gemma_spec``).

    Returns:
        None where those of Megatron's RotaryEmbedding are right: without scaling, with Llama 3's,
        and with the dynamic one, which changes nothing up to ``max_position_embeddings``.
    """
    scaled = _scaled(config)
    if config.rotary_base_local is None:
        return scaled
    local = 1.0 / _powers(config, config.rotary_base_local)
    whole = 1.0 / _powers(config, config.rotary_base) if scaled is None else scaled
    return torch.cat([whole, local])


def _powers(config: ModelConfig, base: float) -> Tensor:
    """Return ``[d / 2]``: one over the frequencies that are not scaled."""
    dim = int(config.kv_channels * config.rotary_percent)
    return base ** (torch.arange(0, dim, 2).float() / dim)


def _scaled(config: ModelConfig) -> Tensor | None:
    scaling = config.rope_scaling or {}
    dim = int(config.kv_channels * config.rotary_percent)
    powers = _powers(config, config.rotary_base)
    if scaling.get("rope_type") == "linear":
        return 1.0 / powers / scaling["factor"]
    if scaling.get("rope_type") == "yarn":
        kept = _unscaled_share(scaling, dim, config.rotary_base)
        return 1.0 / (scaling["factor"] * powers) * (1 - kept) + 1.0 / powers * kept
    return None


def _unscaled_share(scaling: dict[str, Any], dim: int, base: float) -> Tensor:
    """``[d / 2]``: 1 for the fast frequencies that YaRN leaves as they are, 0 for the slow ones.

    Between the dims that turn ``beta_fast`` and ``beta_slow`` times within the original length it
    falls linearly (2309.00071, section 3.2).
    """

    def dim_of(turns: float) -> float:
        length = scaling["original_max_position_embeddings"]
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(scaling["beta_fast"]), dim_of(scaling["beta_slow"])
    if scaling["truncate"]:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2).float() - low) / (high - low or 0.001)
    return 1 - ramp.clamp(0, 1)


def frequencies_by_length(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Two times ``[d / 2]`` fp32 of LongRoPE (2402.13753): of short and of longer sequences."""
    scaling, powers = config.rope_scaling or {}, _powers(config, config.rotary_base)
    short, long = (torch.tensor(scaling[f"{length}_factor"]) for length in ("short", "long"))
    return 1.0 / (short * powers), 1.0 / (long * powers)


def _choose_by_length(rotary: Any, config: ModelConfig) -> None:
    """Let the length of a sequence choose its frequencies, as in transformers.

    That is the whole length, over all ranks that share it, with what is still to be written.
    """
    short, long = (found.to(rotary.inv_freq.device) for found in frequencies_by_length(config))
    original = (config.rope_scaling or {})["original_max_position_embeddings"]

    def before(module: Any, args: tuple[Any, ...]) -> None:
        module.inv_freq = long if args[0] > original else short

    rotary.register_forward_pre_hook(before)


def set_frequencies(model: Any, config: ModelConfig) -> None:
    """Give a model of Megatron-Core the frequencies of its config."""
    if (config.rope_scaling or {}).get("rope_type") == "longrope":
        _choose_by_length(model.rotary_pos_emb, config)
        return
    found = frequencies(config)
    if found is not None:
        rotary = model.rotary_pos_emb
        rotary.inv_freq = found.to(rotary.inv_freq.device)

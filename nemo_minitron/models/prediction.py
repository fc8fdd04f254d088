"""Layers for multi-token prediction of a GPT model (docs/design/mtp.md)."""

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_minitron.models.spec import HAVE_TE, LocalNorm
from nemo_minitron.runtime.megatron import builds_prediction


def prediction_spec(
    config: TransformerConfig, block: Any, vp_stage: int | None, pp_rank: int
) -> Any:
    """Return the spec of a stage's layers for multi-token prediction; None where it has none.

    Args:
        config: Megatron configuration (global sizes).
        block: spec of the stage's other layers; these are made like the last one.
        vp_stage: virtual pipeline stage, None without interleaving.
        pp_rank: pipeline rank.

    Raises:
        ValueError: the installed Megatron-Core builds them otherwise.
    """
    if not config.mtp_num_layers:
        return None
    if not builds_prediction():
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers} (layers for multi-token prediction) needs "
            "megatron-core 0.19; install it with Python 3.12, or import the model with "
            "source_ignore=[num_nextn_predict_layers]"
        )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec
    from megatron.core.transformer import multi_token_prediction as megatron

    if HAVE_TE:
        return get_gpt_mtp_block_spec(
            config, block, use_transformer_engine=True, vp_stage=vp_stage, pp_rank=pp_rank
        )
    count = megatron.get_mtp_num_layers_to_build(config, vp_stage, pp_rank)
    if not count:
        return None
    layer = ModuleSpec(
        module=megatron.MultiTokenPredictionLayer,
        submodules=megatron.MultiTokenPredictionLayerSubmodules(
            enorm=LocalNorm,
            hnorm=LocalNorm,
            layer_norm=LocalNorm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=block.layer_specs[-1],
        ),
    )
    return megatron.MultiTokenPredictionBlockSubmodules(layer_specs=[layer] * count)


# What the decoder's layers were given, and these are given too.
_GIVEN = (
    "input_ids",
    "position_ids",
    "attention_mask",
    "padding_mask",
    "rotary_pos_emb",
    "rotary_pos_cos",
    "rotary_pos_sin",
    "packed_seq_params",
    "sequence_len_offset",
)


def predicted_beside(chunk: Any, hidden: Tensor, given: Mapping[str, Any]) -> Tensor:
    """Put the final states of the layers for multi-token prediction behind the model's own.

    Args:
        chunk: of the last stage.
        hidden: ``[s, b, h]`` final hidden state (``[s / tp, b, h]`` under sequence parallelism).
        given: what Megatron-Core's ``_postprocess`` was called with.

    Returns:
        ``[(1 + layers) s, b, h]``, as Megatron-Core has it; ``hidden`` without such layers.
    """
    if not getattr(chunk, "mtp_process", False):
        return hidden
    inputs = {name: given[name] for name in _GIVEN if name in given}
    extra = given.get("extra_block_kwargs") or {}
    out: Tensor = chunk.mtp(hidden_states=hidden, embedding=chunk.embedding, **inputs, **extra)
    return out


def final_states(chunk: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """Return the model's final state, then those of its layers for multi-token prediction.

    Args:
        chunk: of the last stage.
        hidden: what it returned.
    """
    layers = chunk.config.mtp_num_layers if getattr(chunk, "mtp_process", False) else 0
    return hidden.chunk(1 + (layers or 0))


def shifted(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the values of the next position; 0 at the last one.

    Args:
        values: ``[b, s / cp]``.
        group: the context-parallel group, which shares a sequence out in Megatron's zigzag split.
    """
    from megatron.core.transformer.multi_token_prediction import roll_tensor

    rolled: Tensor = roll_tensor(values, shifts=-1, dims=-1, cp_group=group)[0]
    return rolled

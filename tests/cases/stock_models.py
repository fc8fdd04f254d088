"""Models of megatron-core, GPTModel and HybridModel, as programs build them that know no other."""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from nemo_minitron.config.layout import padded_vocab_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.windows import megatron_fields
from nemo_minitron.models.build_fields import mamba_fields, router_fields

Named = dict[str, torch.Tensor]


def stock_model(
    config: ModelConfig,
    parallel: ParallelConfig,
    own: list[Any] | None,
    pattern: str | None = None,
    *,
    listed: bool = False,
) -> list[Any]:
    """A stock model with the weights of ``own``.

    Args:
        config: sizes.
        parallel: layout, which is initialised.
        own: this rank's part of our model; None leaves the weights as Megatron initialises them.
        pattern: letters of a HybridModel, ``|`` between pipeline stages; None builds a GPTModel. Of
            a GPT model they are pairs of attention and MLP or experts.
        listed: whether the layer spec lists every layer of a stage, as where layers differ.
    """
    from megatron.core import parallel_state

    vpp = parallel.virtual_pipeline_model_parallel_size
    settings = _settings(config, parallel, pattern)
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    chunks = []
    for stage in range(vpp or 1):
        here = stage if vpp else None
        model = _class(settings, pattern, here, listed)(
            config=settings,
            vocab_size=padded_vocab_size(config.vocab_size, parallel.tensor_model_parallel_size),
            max_sequence_length=config.max_position_embeddings,
            pre_process=first(ignore_virtual=True) and stage == 0,
            post_process=last(ignore_virtual=True) and stage == (vpp or 1) - 1,
            position_embedding_type=config.position_embedding_type,
            rotary_percent=config.rotary_percent,
            rotary_base=int(config.rotary_base),
            seq_len_interpolation_factor=(config.rope_scaling or {}).get("factor"),
            vp_stage=here,
        )
        chunks.append(model)
    if own is not None:
        fill(chunks, own, pairs=pattern is not None and config.hybrid_layer_pattern is None)
    return chunks


def fill(chunks: list[Any], own: list[Any], pairs: bool) -> None:
    """Give a model the weights of ``own`` (collective), of which a layer may be two here."""
    weights = by_name(own, lambda chunk: chunk.state_dict().items())
    for model in chunks:
        names = {name: _name(name, model, pairs) for name in model.state_dict()}
        model.load_state_dict({name: weights[known] for name, known in names.items()})


def _class(
    settings: Any, pattern: str | None, vp_stage: int | None, listed: bool
) -> Callable[..., Any]:
    """The model's constructor with its layer spec."""
    from functools import partial

    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    if pattern is None and listed:
        stage = {"use_transformer_engine": False, "vp_stage": vp_stage}
        block = gpt_layer_specs.get_gpt_decoder_block_spec(
            settings, normalization="RMSNorm", **stage
        )
        mtp = None
        if settings.mtp_num_layers:
            mtp = gpt_layer_specs.get_gpt_mtp_block_spec(settings, block, **stage)
        return partial(GPTModel, transformer_layer_spec=block, mtp_block_spec=mtp)
    if pattern is None:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
        return partial(GPTModel, transformer_layer_spec=spec)
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from nemo_minitron.models.spec import LocalNorm
    from tests.cases.hybrid_program import local_stack

    # torch's norm is not made for sequence parallelism, Megatron's own need Transformer Engine.
    norm = LocalNorm if settings.sequence_parallel else WrappedTorchNorm
    spec = local_stack(settings.num_moe_experts, norm)
    return partial(HybridModel, hybrid_stack_spec=spec, hybrid_layer_pattern=pattern)


def _settings(config: ModelConfig, parallel: ParallelConfig, pattern: str | None) -> Any:
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    experts = {
        "num_moe_experts": config.num_moe_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.moe_router_topk,
        "moe_shared_expert_intermediate_size": config.moe_shared_expert_intermediate_size,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "moe_layer_freq": config.moe_layer_freq or 1,
        **router_fields(config),
    }
    return TransformerConfig(
        num_layers=config.num_layers if pattern is None else len(pattern.replace("|", "")),
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=config.layernorm_epsilon,
        gated_linear_unit=config.gated_linear_unit,
        activation_func={"silu": F.silu, "squared_relu": squared_relu}[config.activation],
        add_bias_linear=False,
        add_qkv_bias=config.add_qkv_bias,
        qk_layernorm=config.qk_layernorm,
        mtp_num_layers=config.mtp_num_layers,
        **megatron_fields(config),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **(experts if config.num_moe_experts else {}),
        **mamba_fields(config),
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=parallel.pipeline_model_parallel_layout,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        # What a CPU cannot: Megatron's kernels, and batches of sends.
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        batch_p2p_comm=False,
    )


def by_name(
    chunks: list[Any], tensors: Callable[[Any], Iterable[tuple[str, Any]]], pairs: bool = False
) -> Named:
    """Tensors of all pipeline stages, local to the tensor-parallel rank (collective).

    Args:
        chunks: this rank's part of a model, wrapped for training or not.
        tensors: names and tensors of a chunk.
        pairs: whether a layer of a GPT model is two layers here.

    Returns:
        Name, with the number of the layer in the whole model, -> tensor.
    """
    from megatron.core import parallel_state

    mine = {
        _name(name, getattr(chunk, "module", chunk), pairs): tensor
        for chunk in chunks
        for name, tensor in tensors(chunk)
    }
    group = parallel_state.get_pipeline_model_parallel_group()
    parts: list[Named] = [{}] * group.size()
    dist.all_gather_object(parts, mine, group=group)
    return {name: tensor for part in parts for name, tensor in part.items()}


def _name(name: str, chunk: Any, pairs: bool) -> str:
    name = name.removeprefix("module.")
    found = re.match(r"decoder\.layers\.(\d+)\.", name)
    if found is None:
        return name.replace("final_norm.", "final_layernorm.") if pairs else name
    number = chunk.decoder.layers[int(found[1])].layer_number - 1
    return f"decoder.layers.{number // 2 if pairs else number}.{name[found.end() :]}"

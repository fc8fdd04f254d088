"""Tasks for the rank pool: a hybrid model of Megatron-Core with the weights of a NemotronH."""

from typing import Any

import torch

from nemo_minitron.config.parallel import ParallelConfig
from tests.dist.live_cases import _logits, _start

PATTERN = "M-M*ME"
SIZES = {
    "hidden_size": 48,
    "ffn_hidden_size": 80,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_state_dim": 16,
    "num_moe_experts": 4,
    "moe_ffn_hidden_size": 24,
    "moe_router_topk": 2,
    "moe_shared_expert_intermediate_size": 32,
    "moe_router_topk_scaling_factor": 2.5,
}
VOCAB = 96


def build(parallel: ParallelConfig, groups: Any) -> list[Any]:
    """This rank's chunks, in evaluation mode."""
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.transformer_config import TransformerConfig

    from nemo_minitron.models.hybrid_spec import HiddenHybridModel, stack_spec
    from nemo_minitron.runtime import cpu

    cpu.install_mamba()
    virtual = parallel.virtual_pipeline_model_parallel_size
    mcore = TransformerConfig(
        num_layers=len(PATTERN),
        **SIZES,
        normalization="RMSNorm",
        activation_func=squared_relu,
        add_bias_linear=False,
        is_hybrid_model=True,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual,
        context_parallel_size=parallel.context_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=torch.float32,
    )
    stages = list(range(virtual)) if virtual else [None]
    last = stages[-1]
    chunks = []
    for stage in stages:
        chunk = HiddenHybridModel(
            mcore,
            stack_spec(mcore),
            vocab_size=VOCAB,
            max_sequence_length=64,
            hybrid_layer_pattern="|".join(PATTERN[i : i + 2] for i in range(0, 6, 2))
            if virtual == 3
            else PATTERN,
            pre_process=groups.is_first_stage and not stage,
            post_process=groups.is_last_stage and stage == last,
            pg_collection=groups.collection,
            vp_stage=stage,
        )
        chunks.append(chunk.eval())
    return chunks


def state_of(chunks: list[Any], groups: Any) -> dict[str, Any]:
    metadata = {"dp_cp_group": groups.dp_cp}
    return {
        f"model{index}": chunk.sharded_state_dict(metadata=metadata)
        for index, chunk in enumerate(chunks)
    }


def save_hybrid(weights: dict[str, torch.Tensor], folder: str) -> None:
    """Write what one rank holds after taking the weights, by the names of its parameters."""
    from nemo_minitron.runtime.megatron import save_sharded

    groups = _start(ParallelConfig())
    (model,) = chunks = build(ParallelConfig(), groups)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    save_sharded(state_of(chunks, groups), folder)


def hybrid_logits(folder: str, ids: torch.Tensor, parallel: ParallelConfig) -> torch.Tensor | None:
    """Logits of the saved model at a layout."""
    from megatron.core import dist_checkpointing

    groups = _start(parallel)
    chunks = build(parallel, groups)
    state = dist_checkpointing.load(state_of(chunks, groups), folder)
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{index}"])
    return _logits(chunks, groups, ids)

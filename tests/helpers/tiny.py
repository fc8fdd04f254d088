"""Small models and token batches that tests share."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import Family

LLAMA = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=12,
    vocab_size=101,
    max_position_embeddings=128,
)

MIXTRAL = replace(
    LLAMA,
    family="mixtral",
    ffn_hidden_size=40,
    num_moe_experts=4,
    moe_ffn_hidden_size=40,
    moe_router_topk=2,
)

QWEN2_MOE = replace(
    MIXTRAL,
    family="qwen2_moe",
    add_qkv_bias=True,
    moe_router_pre_softmax=True,
    moe_shared_expert_intermediate_size=56,
    moe_shared_expert_gate=True,
)

QWEN3_NEXT = replace(
    QWEN2_MOE,
    family="qwen3_next",
    add_qkv_bias=False,
    moe_router_pre_softmax=False,
    qk_layernorm=True,
    layernorm_zero_centered_gamma=True,
    rotary_percent=0.5,
    ffn_hidden_size=64,
    moe_layer_freq=[0, 1, 1, 1],
    linear_attention_freq=[1, 0, 1, 1],
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=6,
    linear_value_head_dim=10,
    linear_conv_kernel_dim=3,
    attention_output_gate=True,
)

QWEN3_5 = replace(
    QWEN3_NEXT,
    family="qwen3_5",
    num_moe_experts=None,
    moe_ffn_hidden_size=None,
    moe_shared_expert_intermediate_size=None,
    moe_shared_expert_gate=False,
    moe_layer_freq=None,
)

QWEN3 = replace(LLAMA, family="qwen3", qk_layernorm=True)

SMOLLM3 = replace(LLAMA, family="smollm3", no_rope_freq=[0, 1, 1, 0])

OLMO2 = replace(LLAMA, family="olmo2")

GRANITE = replace(
    LLAMA,
    family="granite",
    multipliers={"embedding": 12.0, "attention": 0.125, "residual": 0.25, "logits": 8.0},
)

GEMMA2 = replace(
    LLAMA,
    family="gemma2",
    layernorm_zero_centered_gamma=True,
    activation="gelu_tanh",
    apply_embedding_scaling=True,
    multipliers={"attention": 20**-0.5},
    attn_logit_softcapping=2.0,
    final_logit_softcapping=3.0,
    window_size=[6, 0, 6, 0],
    share_embeddings_and_output_weights=True,
)

GEMMA3 = replace(
    GEMMA2,
    family="gemma3",
    qk_layernorm=True,
    rotary_base=1e6,
    rotary_base_local=1e4,
    attn_logit_softcapping=None,
    final_logit_softcapping=None,
    window_size=[6, 6, 0, 6],
)

_YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 8,
    "beta_fast": 32,
    "beta_slow": 1,
    "truncate": True,
    "attention_factor": 1.0,
}
MINISTRAL = replace(LLAMA, family="ministral", window_size=[6, 0, 6, 0])
MINISTRAL3 = replace(
    LLAMA, family="ministral3", rope_scaling={**_YARN, "llama_4_scaling_beta": 0.1}
)

PHI3_LONG = replace(
    LLAMA,
    family="phi3",
    kv_channels=8,
    rotary_percent=0.75,
    rope_scaling={
        "rope_type": "longrope",
        "short_factor": [1.0, 1.1, 1.5],
        "long_factor": [1.0, 2.0, 6.5],
        "original_max_position_embeddings": 16,
        "attention_factor": 1.25,
    },
)

NEMOTRON = replace(
    LLAMA,
    family="nemotron",
    normalization="LayerNorm",
    layernorm_zero_centered_gamma=True,
    gated_linear_unit=False,
    activation="squared_relu",
    rotary_percent=0.5,
)

DENSE_HYBRID = replace(
    LLAMA,
    family="nemotron_h",
    hybrid_layer_pattern="M*M-",
    gated_linear_unit=False,
    activation="squared_relu",
    position_embedding_type="none",
    mamba_num_heads=8,
    mamba_head_dim=8,
    mamba_num_groups=2,
    mamba_state_dim=16,
)

NEMOTRON_H = replace(
    DENSE_HYBRID,
    num_layers=8,
    hybrid_layer_pattern="M-M*MEM-",
    num_moe_experts=4,
    moe_ffn_hidden_size=24,
    moe_router_topk=2,
    moe_shared_expert_intermediate_size=32,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
)

DEEPSEEK_V3 = replace(
    LLAMA,
    family="deepseek_v3",
    num_query_groups=8,
    qk_layernorm=True,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_head_dim=10,
    qk_pos_emb_head_dim=6,
    rope_scaling={
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 32,
        "beta_slow": 1,
        "truncate": True,
        "attention_factor": 0.9,
        "mscale_all_dim": 1.2,
    },
)
DEEPSEEK_EXPERTS = replace(
    DEEPSEEK_V3,
    moe_layer_freq=[0, 1, 1, 1],
    num_moe_experts=8,
    moe_ffn_hidden_size=24,
    moe_shared_expert_intermediate_size=48,
    moe_router_topk=2,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
    moe_router_num_groups=2,
    moe_router_group_topk=1,
)
DEEPSEEK_V2 = replace(DEEPSEEK_V3, family="deepseek_v2", q_lora_rank=None, rope_scaling=None)
GLM4_MOE = replace(
    LLAMA,
    family="glm4_moe",
    rotary_percent=0.5,
    qk_layernorm=True,
    add_qkv_bias=True,
    num_moe_experts=8,
    moe_ffn_hidden_size=24,
    moe_layer_freq=[0, 1, 1, 1],
    moe_router_topk=4,
    moe_shared_expert_intermediate_size=48,
    moe_router_score_function="sigmoid",
    moe_router_enable_expert_bias=True,
    moe_router_topk_scaling_factor=2.5,
    moe_router_num_groups=4,
    moe_router_group_topk=2,
)

GPT_OSS = replace(
    MIXTRAL,
    family="gpt_oss",
    activation="quick_gelu",
    activation_func_clamp_value=0.5,
    glu_linear_offset=1.0,
    add_bias_linear=True,
    add_qkv_bias=True,
    window_size=[6, 0, 6, 0],
)

GPT2 = replace(
    LLAMA,
    family="gpt2",
    num_attention_heads=4,
    num_query_groups=4,
    kv_channels=16,
    normalization="LayerNorm",
    gated_linear_unit=False,
    activation="gelu_tanh",
    add_bias_linear=True,
    add_qkv_bias=True,
    position_embedding_type="learned_absolute",
    share_embeddings_and_output_weights=True,
)


def random_weights(
    config: ModelConfig, seed: int = 0, family: Family | None = None
) -> dict[str, torch.Tensor]:
    """Global tensors of a random model, keyed by Megatron name (local spec)."""
    from nemo_minitron.families.registry import family_of

    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, row, _ in (family or family_of(config)).parameters(config):
        tensor = torch.randn(row.shape(config), generator=generator) * 0.2
        if "norm" in name and name.endswith("weight"):
            tensor = tensor + 1.0
        out[name] = tensor
    return out


def token_batch(samples: int, seq_length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """``[samples, seq_length + 1]`` random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (samples, seq_length + 1), generator=generator)


def write_weights(folder: Path, config: ModelConfig, seed: int) -> None:
    """Random model as a torch_dist checkpoint (one process, no group)."""
    from nemo_minitron.checkpoint.lazy import from_tensor
    from nemo_minitron.checkpoint.torch_dist import write_torch_dist
    from nemo_minitron.families.registry import family_of

    folder.mkdir(parents=True)
    store = {name: from_tensor(tensor) for name, tensor in random_weights(config, seed).items()}
    write_torch_dist(folder, store, family_of(config), config, workers=1)


def write_result(folder: Path, config: ModelConfig, seed: int) -> Path:
    """Random model as a complete result folder of ``import``."""
    from nemo_minitron.checkpoint.artifact import output_folder
    from nemo_minitron.config.stages import ImportConfig

    cfg = ImportConfig(output_dir=str(folder), source="-", overwrite=True)
    with output_folder(cfg, "import", {}) as work:
        write_weights(work / "checkpoint", config, seed)
        config.save(work / "checkpoint")
    return folder


def read_weights(result: Path) -> dict[str, torch.Tensor]:
    """Global tensors of a result folder, keyed by Megatron name."""
    from nemo_minitron.checkpoint.torch_dist import read_torch_dist
    from nemo_minitron.families.registry import family_of

    folder = result / "checkpoint"
    config = ModelConfig.load(folder)
    store = read_torch_dist(folder, family_of(config), config)
    return {name: tensor.read() for name, tensor in store.items()}


def write_npy(path: Path, samples: int, seq_length: int, vocab_size: int, seed: int = 0) -> Path:
    """Token ids ``[samples, seq_length]`` as ``data.path`` takes them."""
    np.save(path, token_batch(samples, seq_length - 1, vocab_size, seed).numpy())
    return path

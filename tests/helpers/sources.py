"""Settings files as Megatron-LM, Megatron-Bridge, NeMo 2 and NeMo 1 write them, for tiny models."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import yaml

from nemo_minitron.config.model import ModelConfig

FUNCTIONS = {
    "silu": "torch.nn.functional.silu",
    "gelu": "torch._C._nn.gelu",
    "gelu_tanh": "nemo.collections.llm.fn.activation.openai_gelu",
    "squared_relu": "megatron.core.activations.squared_relu",
}


def megatron_args(config: ModelConfig, **over: Any) -> Namespace:
    """``args`` of a Megatron-LM run, as far as they describe the model, and some that do not."""
    experts = config.num_moe_experts
    said = {
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "group_query_attention": config.num_query_groups != config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "max_position_embeddings": config.max_position_embeddings,
        "seq_length": 32,
        "normalization": config.normalization,
        "norm_epsilon": config.layernorm_epsilon,
        "apply_layernorm_1p": config.layernorm_zero_centered_gamma,
        "swiglu": config.activation == "silu",
        "squared_relu": config.activation == "squared_relu",
        "quick_geglu": False,
        "bias_gelu_fusion": config.activation == "gelu_tanh",
        "add_bias_linear": config.add_bias_linear,
        "add_qkv_bias": config.add_qkv_bias,
        "qk_layernorm": config.qk_layernorm,
        "position_embedding_type": config.position_embedding_type,
        "rotary_base": int(config.rotary_base),
        "rotary_percent": config.rotary_percent,
        "use_rope_scaling": config.rope_scaling is not None,
        "rope_scaling_factor": (config.rope_scaling or {}).get("factor", 8.0),
        "rotary_seq_len_interpolation_factor": None,
        "untie_embeddings_and_output_weights": not config.share_embeddings_and_output_weights,
        "num_experts": experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.moe_router_topk,
        "moe_router_pre_softmax": config.moe_router_pre_softmax,
        "moe_layer_freq": 1,
        "moe_router_score_function": "softmax",
        "moe_router_load_balancing_type": "aux_loss",
        "multi_latent_attention": False,
        "heterogeneous_layers_config_path": None,
        "tokenizer_type": "NullTokenizer",
        "tokenizer_model": None,
        "vocab_size": config.vocab_size - 1,
        "padded_vocab_size": 1024,
        "tensor_model_parallel_size": 2,
        "params_dtype": torch.bfloat16,
        "save": "/somewhere",
    }
    return Namespace(**{**said, **over})


def core_fields(config: ModelConfig, **over: Any) -> dict[str, Any]:
    """Fields of TransformerConfig and GPTModel as a YAML file has them."""
    names = (
        "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups kv_channels",
        "normalization layernorm_epsilon layernorm_zero_centered_gamma gated_linear_unit",
        "add_bias_linear add_qkv_bias qk_layernorm position_embedding_type rotary_percent",
        "share_embeddings_and_output_weights num_moe_experts moe_ffn_hidden_size moe_router_topk",
        "moe_router_pre_softmax moe_shared_expert_intermediate_size moe_shared_expert_gate",
    )
    said = {
        **{name: getattr(config, name) for name in " ".join(names).split()},
        "rotary_base": int(config.rotary_base),
        "seq_length": config.max_position_embeddings,
        "activation_func": {"_target_": FUNCTIONS[config.activation], "_call_": False},
        "bias_activation_fusion": config.activation == "silu",
        "rotary_interleaved": False,
        "seq_len_interpolation_factor": None,
        "window_size": None,
        "moe_layer_freq": 1,
        "moe_router_load_balancing_type": "aux_loss",
        "multi_latent_attention": False,
        "init_method": {
            "_target_": "torch.nn.init.normal_",
            "_partial_": True,
            "_args_": [],
            "std": 0.02,
        },
        "attention_backend": {
            "_target_": "megatron.core.transformer.enums.AttnBackend",
            "_call_": True,
            "_args_": [5],
        },
    }
    if config.rope_scaling is not None:
        factor = config.rope_scaling["factor"]
        said |= {"scale_factor": factor, "low_freq_factor": 1, "high_freq_factor": 4}
        said["old_context_len"] = 8192
    return {**said, **over}


def write_tokenizer(folder: Path, tokens: int) -> None:
    """A word-level tokenizer of ``tokens`` tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = {f"t{i}": i for i in range(tokens - 2)}
    added = [{"id": tokens - 2, "content": "<s>"}, {"id": tokens - 1, "content": "</s>"}]
    text = {"model": {"type": "WordLevel", "vocab": vocab}, "added_tokens": added}
    (folder / "tokenizer.json").write_text(json.dumps(text))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_bridge(folder: Path, config: ModelConfig, **over: Any) -> None:
    """``run_config.yaml`` and ``tokenizer/`` of an iteration of Megatron-Bridge."""
    generation = {"_call_": True, "config_dict": {"temperature": 0.6, "top_p": None}}
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **core_fields(config),
        "vocab_size": config.vocab_size,
        "should_pad_vocab": True,
        "generation_config": generation,
        **over,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run_config.yaml").write_text(yaml.safe_dump({"model": model}))
    write_tokenizer(folder / "tokenizer", config.vocab_size - 1)


def write_nemo2(root: Path, config: ModelConfig, **over: Any) -> None:
    """``context/`` of a NeMo 2 checkpoint."""
    context = root / "context"
    write_tokenizer(context / "nemo_tokenizer", config.vocab_size)
    model = {
        "_target_": "nemo.collections.llm.gpt.model.llama.LlamaModel",
        "config": {
            "_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config8B",
            **core_fields(config, **over),
        },
        "tokenizer": {
            "_target_": "nemo.collections.common.tokenizers.huggingface.AutoTokenizer",
            "pretrained_model_name": "nemo_tokenizer",
        },
    }
    (context / "model.yaml").write_text(yaml.safe_dump(model))
    (context / "io.json").write_text("{}")


ACTIVATIONS_1 = {"silu": "fast-swiglu", "squared_relu": "squared-relu", "gelu_tanh": "approx-gelu"}


def nemo1_config(config: ModelConfig, **over: Any) -> dict[str, Any]:
    """``model_config.yaml`` of NeMo 1."""
    norm = config.normalization.lower()
    return {
        "mcore_gpt": True,
        "target": "nemo.collections.nlp.models.language_modeling.MegatronGPTModel",
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_query_groups,
        "kv_channels": config.kv_channels,
        "encoder_seq_length": config.max_position_embeddings,
        "normalization": norm + ("1p" if config.layernorm_zero_centered_gamma else ""),
        "layernorm_epsilon": "1e-5",
        "bias": config.add_bias_linear,
        "activation": ACTIVATIONS_1[config.activation],
        "position_embedding_type": config.position_embedding_type,
        "rotary_percentage": config.rotary_percent,
        "share_embeddings_and_output_weights": config.share_embeddings_and_output_weights,
        "tokenizer": {
            "library": "sentencepiece",
            "model": None,
            "vocab_file": "nemo:ab_vocab.json",
        },
        **over,
    }

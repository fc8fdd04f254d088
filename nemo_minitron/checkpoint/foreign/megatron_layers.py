"""Read the fields of special layers in a foreign config: experts, Mamba, latent attention.

Part of ``megatron_fields``, which see.
"""

from collections.abc import Sequence

from nemo_minitron.checkpoint.foreign.megatron_stated import Stated
from nemo_minitron.config.model_checks import LINEAR_SIZES, LINEAR_VARIANT
from nemo_minitron.documents import JsonObject
from nemo_minitron.families.rope import concentration


def experts_fields(stated: Stated, ffn: int) -> JsonObject:
    """Return the fields of ModelConfig about experts; without experts the width of the MLP."""
    experts = stated.get("num_moe_experts", None)
    if experts is None:
        return {"ffn_hidden_size": ffn}
    width, routed = stated.get("moe_ffn_hidden_size", ffn), _routed_layers(stated)
    return {
        # The width of dense layers; that of the experts where there are none.
        "ffn_hidden_size": width if routed is None else ffn,
        "moe_layer_freq": routed,
        "num_moe_experts": experts,
        "moe_ffn_hidden_size": width,
        "moe_router_topk": stated.get("moe_router_topk", 2),
        "moe_router_pre_softmax": bool(stated.get("moe_router_pre_softmax", False)),
        "moe_shared_expert_intermediate_size": stated.get(
            "moe_shared_expert_intermediate_size", None
        ),
        "moe_shared_expert_gate": bool(stated.get("moe_shared_expert_gate", False)),
        **_router(stated),
    }


def _routed_layers(stated: Stated) -> list[int] | None:
    """Return for each layer whether it has experts; a number n means every n-th layer."""
    value, layers = stated.get("moe_layer_freq", 1), stated.need("num_layers")
    if isinstance(value, int):
        value = [layer % value == 0 for layer in range(layers)] if value > 0 else [False]
    found = [int(bool(entry)) for entry in value] if isinstance(value, Sequence) else []
    if len(found) != layers or not any(found):
        only = f"a list of num_layers={layers} entries with a 1, or a number above 0"
        raise stated.refuse("moe_layer_freq", only)
    return None if all(found) else found


def stated_pattern(stated: Stated) -> str | None:
    """Return letters of the layers of a hybrid model, one each, or None for a GPT model."""
    key = "hybrid_layer_pattern"
    pattern = stated.get(key, None) or stated.get("hybrid_override_pattern", None)
    if pattern is None:
        return None
    if "/" in pattern:
        raise stated.refuse(key, "a pattern without layers for multi-token prediction (/)")
    return str(pattern).replace("|", "")


def hybrid_fields(stated: Stated, ffn: int) -> JsonObject:
    """Return fields of ModelConfig about hybrid models; nothing for others."""
    pattern = stated_pattern(stated)
    if pattern is None:
        return {}
    sizes = {"mamba_head_dim": 64, "mamba_num_groups": 8, "mamba_state_dim": 128}
    found: JsonObject = {name: stated.get(name, default) for name, default in sizes.items()}
    found |= {
        "num_layers": len(pattern),
        "ffn_hidden_size": ffn,
        "hybrid_layer_pattern": pattern,
        # Megatron-Core's own default.
        "mamba_num_heads": stated.get(
            "mamba_num_heads", 2 * stated.need("hidden_size") // found["mamba_head_dim"]
        ),
    }
    return found


def linear_fields(stated: Stated) -> JsonObject:
    """Return fields of ModelConfig about gated delta nets and gated attention, if any."""
    found: JsonObject = {"attention_output_gate": bool(stated.get("attention_output_gate", False))}
    if stated.get("experimental_attention_variant", None) != LINEAR_VARIANT:
        return found
    value, layers = stated.need("linear_attention_freq"), stated.need("num_layers")
    if isinstance(value, int):  # attention in every n-th layer
        value = [int((layer + 1) % value != 0) for layer in range(layers)]
    return {
        **found,
        "linear_attention_freq": list(value),
        **{name: stated.need(name) for name in LINEAR_SIZES},
    }


def _router(stated: Stated) -> JsonObject:
    """Read how a router chooses experts if it does not use a plain softmax."""
    score = stated.get("moe_router_score_function", "softmax")
    scale = float(stated.get("moe_router_topk_scaling_factor", None) or 1)
    return {
        "moe_router_score_function": score,
        "moe_router_enable_expert_bias": bool(stated.get("moe_router_enable_expert_bias", False)),
        "moe_router_topk_scaling_factor": None if scale == 1 and score == "softmax" else scale,
        "moe_router_num_groups": stated.get("moe_router_num_groups", None),
        "moe_router_group_topk": stated.get("moe_router_group_topk", None),
    }


def stated_latent(stated: Stated) -> bool:
    """Whether the attention is multi-latent and has sizes."""
    sized = stated.values.get("kv_lora_rank") is not None
    return sized and bool(stated.get("multi_latent_attention", False))


def latent_fields(stated: Stated, heads: int) -> JsonObject:
    """Return fields of ModelConfig about multi-latent attention; nothing for other attention."""
    if not stated_latent(stated):
        return {}
    return {
        "num_query_groups": heads,
        "kv_channels": stated.get("v_head_dim", 128),
        "kv_lora_rank": stated.need("kv_lora_rank"),
        "q_lora_rank": stated.get("q_lora_rank", None),
        "qk_head_dim": stated.get("qk_head_dim", 128),
        "qk_pos_emb_head_dim": stated.get("qk_pos_emb_head_dim", 64),
    }


def latent_yarn(stated: Stated) -> JsonObject | None:
    """Return the scaling of rotary frequencies in Hugging Face's words, or None.

    Multi-latent attention has fields and defaults of its own for it.
    """
    kind = stated.get("rope_type", "yarn")
    if kind != "yarn":
        if kind != "rope":
            raise stated.refuse("rope_type", "rope or yarn")
        return None
    factor = float(stated.get("rotary_scaling_factor", 40))
    everywhere = float(stated.get("mscale_all_dim", 0.0))
    own = concentration(factor, float(stated.get("mscale", 1.0)))
    return {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": stated.get("original_max_position_embeddings", 4096),
        "beta_fast": stated.get("beta_fast", 32),
        "beta_slow": stated.get("beta_slow", 1),
        "truncate": True,
        "attention_factor": own / concentration(factor, everywhere),
        "mscale_all_dim": everywhere,
    }

"""DeepSeek-V2 and V3: multi-latent attention (MLA), and experts in all layers but the first ones.

Keys and values of all heads are made of one latent, queries of another one or of the input; one
rotated key is shared by all heads. Channels of a head are rotated in neighbouring pairs, as
Megatron-Core does it. The router of V2 takes a softmax over all experts; that of V3 takes sigmoids
and picks experts, out of the best groups of them, by these and a bias that is not part of weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import glm4_moe, latent
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.experts import (
    beside_dense,
    dense_layers,
    shared_experts,
    sigmoid_router,
)
from nemo_minitron.families.prediction import (
    MTP_LAYERS,
    REFUSED_LAYERS,
    prediction_rows,
    read_layers,
)
from nemo_minitron.families.table import Family


def _biased(config: ModelConfig) -> bool:
    return config.moe_router_enable_expert_bias


_ROUTED = (
    replace(row, when=_biased) if "expert_bias" in row.name else row for row in glm4_moe.ROUTED
)
ROWS = beside_dense(latent.DENSE, _ROUTED)

_EXPERT_KEYS = words(
    "n_routed_experts n_shared_experts moe_intermediate_size num_experts_per_tok n_group "
    "topk_group norm_topk_prob routed_scaling_factor topk_method scoring_func moe_layer_freq "
    # how experts were trained and spread out
    "ep_size seq_aux aux_loss_alpha"
)
_READS = latent.READS | _EXPERT_KEYS | {"first_k_dense_replace"}
V3_READS = _READS | {"rope_interleave", MTP_LAYERS}
# What transformers' configs take where config.json says nothing.
_V2_DEFAULTS = {
    **latent.DEFAULTS,
    "intermediate_size": 11008,
    "first_k_dense_replace": 0,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": False,
    "topk_method": "greedy",
}
_V3_DEFAULTS = {
    **latent.DEFAULTS,
    "num_key_value_heads": 128,
    "max_position_embeddings": 4096,
    "intermediate_size": 18432,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "moe_intermediate_size": 2048,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
}


def _only(hf: Mapping[str, Any], **values: Any) -> None:
    """Refuse keys of config.json at other values than these.

    Raises:
        ValueError: names the key and its values.
    """
    for key, (first, *others) in values.items():
        if hf.get(key, first) not in (first, *others):
            raise ValueError(
                f"config.json {key}={hf[key]} is not supported for family 'deepseek'; only "
                f"{' or '.join(map(str, (first, *others)))}"
            )


def _experts(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields of ModelConfig that both routers have; none where all layers are dense."""
    dense, layers = hf["first_k_dense_replace"], hf["num_hidden_layers"]
    if dense >= layers:
        return {}
    _only(hf, moe_layer_freq=(1,))
    if not hf["n_shared_experts"]:
        raise ValueError(
            f"config.json n_shared_experts={hf['n_shared_experts']} is not supported: transformers "
            "adds the output of a shared expert in every layer of experts; at least 1"
        )
    width = hf["moe_intermediate_size"]
    routed = [int(layer >= dense) for layer in range(layers)]
    return {
        "num_moe_experts": hf["n_routed_experts"],
        "moe_router_topk": hf["num_experts_per_tok"],
        "moe_shared_expert_intermediate_size": hf["n_shared_experts"] * width,
        "moe_router_topk_scaling_factor": float(hf["routed_scaling_factor"]),
        **dense_layers(routed, width, hf["intermediate_size"]),
    }


def _groups(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Groups of experts, the best of which are picked from; transformers ranks one by its best."""
    groups, picked, topk = hf["n_group"] or 1, hf["topk_group"] or 1, hf["num_experts_per_tok"]
    if groups == 1:
        return {}
    if topk // picked != 1:
        raise ValueError(
            f"config.json n_group={groups} with topk_group={picked} and num_experts_per_tok={topk} "
            "is not supported: Megatron-Core ranks groups by as many experts as each gives, "
            f"{topk // picked}, transformers by 1"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": picked}


def _sigmoid_router(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the router of V3."""
    found = _experts(hf)
    if not found:
        return found
    _only(hf, topk_method=("noaux_tc",), scoring_func=("sigmoid",))
    ungrouped = {key: hf[key] or 1 for key in ("n_group", "topk_group")}
    return {**found, **sigmoid_router({**hf, **ungrouped})}


def _softmax_router(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the router of V2."""
    found = _experts(hf)
    if not found:
        return found
    greedy = ("greedy", "group_limited_greedy")
    _only(hf, topk_method=greedy, scoring_func=("softmax",), norm_topk_prob=(False,))
    grouped = hf["topk_method"] != "greedy"
    return {**found, **(_groups(hf) if grouped else {}), "moe_router_pre_softmax": True}


def _from_hf(
    family: str,
    reads: frozenset[str],
    known: dict[str, Any],
    router: Callable[[Mapping[str, Any]], dict[str, Any]],
) -> ModelConfig:
    """Return sizes of a config.json with its defaults filled in."""
    check_keys(family, known, reads)
    return replace(latent.from_hf(known, family), **router(known))


def v3_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face DeepSeek-V3 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    known = {**_V3_DEFAULTS, **hf}
    found = _from_hf("deepseek_v3", V3_READS, known, _sigmoid_router)
    return replace(found, mtp_num_layers=read_layers(hf), hf=dict(hf))


def v2_from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face DeepSeek-V2 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    known = {**_V2_DEFAULTS, **hf}
    return replace(_from_hf("deepseek_v2", _READS, known, _softmax_router), hf=dict(hf))


def _to_hf(config: ModelConfig, reads: frozenset[str]) -> dict[str, Any]:
    kept = _EXPERT_KEYS if config.num_moe_experts is None else frozenset()
    carried = {key: value for key, value in config.hf.items() if key not in reads - kept}
    dense = {"first_k_dense_replace": config.num_layers}
    return latent.to_hf(replace(config, hf=carried)) | dense | _written_experts(config)


def _check_v2(config: ModelConfig) -> None:
    """Refuse what transformers could not open as a DeepSeek-V2.

    Raises:
        ValueError: names both sizes and the keys.
    """
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} must be a multiple of num_attention_heads="
            f"{config.num_attention_heads} in transformers' DeepseekV2Config; set "
            "pruning.target.hidden_size or pruning.target.num_attention_heads so that it is"
        )


def _written_experts(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json about experts."""
    if config.num_moe_experts is None:
        return {}
    routed = config.moe_layer_freq or [1]
    mixed = config.moe_layer_freq is not None
    return {
        "first_k_dense_replace": routed.index(1),
        "intermediate_size": config.ffn_hidden_size
        if mixed
        else config.hf.get("intermediate_size", config.ffn_hidden_size),
        "n_routed_experts": config.num_moe_experts,
        "n_shared_experts": shared_experts(config),
        "moe_intermediate_size": config.moe_ffn_hidden_size,
        "num_experts_per_tok": config.moe_router_topk,
        "routed_scaling_factor": config.moe_router_topk_scaling_factor,
        "n_group": config.moe_router_num_groups or 1,
        "topk_group": config.moe_router_group_topk or 1,
    }


def v3_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) DeepSeek-V3.

    Raises:
        ValueError: config.json cannot say these sizes.
    """
    return {
        **_to_hf(config, V3_READS),
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "rope_interleave": True,
        MTP_LAYERS: config.mtp_num_layers or 0,
        "norm_topk_prob": True,
    }


def v2_to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) DeepSeek-V2.

    Raises:
        ValueError: transformers could not open a model of these sizes.
    """
    _check_v2(config)
    grouped = config.moe_router_num_groups is not None
    return {
        **_to_hf(config, _READS),
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "norm_topk_prob": False,
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
    }


_REFUSES = (
    "`rope_scaling` other than `yarn` with `truncate=true`",
    "`attention_bias=true` or `mlp_bias=true`: the table has no biases",
    "`num_key_value_heads` other than `num_attention_heads`; both are pruned to the same number, "
    "and heads are not merged (`pruning.merge_heads`)",
    "a shared expert whose width is no multiple of that of the others: config.json counts them",
)
_MEGATRON = {"multi_latent_attention": True, "moe_router_dtype": "fp32"}
DEEPSEEK_V2 = Family(
    "deepseek_v2",
    {"DeepseekV2ForCausalLM": "deepseek_v2"},
    ROWS,
    v2_from_hf,
    v2_to_hf,
    _READS,
    models="DeepSeek-V2-Lite",
    refuses=(
        *_REFUSES,
        "`topk_method=group_limited_greedy` (DeepSeek-V2) unless each group gives one expert: "
        "Megatron-Core ranks groups by as many experts as each gives, transformers by the best one",
        "`hidden_size` that is no multiple of `num_attention_heads`, as transformers does",
    ),
    megatron=_MEGATRON,
)
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    {"DeepseekV3ForCausalLM": "deepseek_v3"},
    (*ROWS, *prediction_rows(ROWS)),
    v3_from_hf,
    v3_to_hf,
    V3_READS,
    models="DeepSeek-V3",
    refuses=(
        *_REFUSES,
        "`rope_interleave=false`: Megatron-Core rotates neighbouring channels",
        "groups of experts that Megatron-Core ranks otherwise, and one expert per token",
        REFUSED_LAYERS,
    ),
    megatron=_MEGATRON,
)

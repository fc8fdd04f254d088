"""Multi-latent attention (MLA) as DeepSeek has it: its rows, and its part of config.json.

Keys and values of all heads are made of one latent, queries of another one or of the input; one
rotated key is shared by all heads. Channels of a head are rotated in neighbouring pairs, as
Megatron-Core does it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama
from nemo_minitron.families.config_json import words
from nemo_minitron.families.rope import Rope, read_rope
from nemo_minitron.families.table import Row

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."
_ATTENTION, _HF_ATTENTION = _LAYER + "self_attention.", _HF_LAYER + "self_attn."


def _low_rank_queries(config: ModelConfig) -> bool:
    return config.q_lora_rank is not None


def _full_queries(config: ModelConfig) -> bool:
    return config.q_lora_rank is None


def _row(
    name: str, dims: tuple[str, ...], tp_dim: int | None, hf: str, norm_of: str = "", **more: Any
) -> Row:
    """A row of attention; Transformer Engine keeps a norm in the linear layer that reads it."""
    te_name = f"{_ATTENTION}{norm_of}.layer_norm_weight" if norm_of else None
    names = (f"{_HF_ATTENTION}{hf}.weight",)
    return Row(f"{_ATTENTION}{name}.weight", dims, tp_dim, names, te_name=te_name, **more)


def _plain(row: Row) -> Row:
    """A row of Llama; two linear layers read the first norm, so it is not fused with either."""
    return replace(row, te_name=None) if "input_layernorm" in row.name else row


LATENT_EPSILON = 1e-6
"""Epsilon of the norms of latents in transformers, whatever the model's other norms have."""
_ROWS = (
    _row("linear_q_proj", ("latent_query", "hidden"), 0, "q_proj", when=_full_queries),
    _row("linear_q_down_proj", ("q_lora", "hidden"), None, "q_a_proj", when=_low_rank_queries),
    _row(
        "q_layernorm",
        ("q_lora",),
        None,
        "q_a_layernorm",
        norm_of="linear_q_up_proj",
        when=_low_rank_queries,
    ),
    _row("linear_q_up_proj", ("latent_query", "q_lora"), 0, "q_b_proj", when=_low_rank_queries),
    _row("linear_kv_down_proj", ("kv_latent", "hidden"), None, "kv_a_proj_with_mqa"),
    _row("kv_layernorm", ("kv_lora",), None, "kv_a_layernorm", norm_of="linear_kv_up_proj"),
    _row("linear_kv_up_proj", ("latent_key_value", "kv_lora"), 0, "kv_b_proj"),
    _row("linear_proj", ("hidden", "head"), 1, "o_proj"),
)
DENSE = (*(_plain(row) for row in llama.ROWS if ".self_attention." not in row.name), *_ROWS)
"""Rows of a network like Llama's with this attention."""

NAMES = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
}
"""Field of ModelConfig -> what config.json calls it; none of these sizes is ever pruned."""
READS = (llama.READS - {"sliding_window"}) | words(
    "q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim qk_head_dim v_head_dim"
)
# What transformers' configs take where config.json says nothing.
DEFAULTS = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}


def _rope(hf: Mapping[str, Any]) -> Rope:
    """Return rotary positions; YaRN also has a factor of the scores here (``mscale_all_dim``)."""
    rope = llama.whole(read_rope(dict(hf)))
    if rope.scaling is None:
        return rope
    kind = rope.scaling["rope_type"]
    if kind != "yarn" or not rope.scaling["truncate"]:
        raise ValueError(
            f"config.json rope_scaling={rope.scaling} is not supported with multi-latent "
            "attention; only null and yarn with truncate=true, as Megatron-Core has it"
        )
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    everywhere = float(given.get("mscale_all_dim") or 0)
    return replace(rope, scaling={**rope.scaling, "mscale_all_dim": everywhere})


def _refuse(hf: Mapping[str, Any]) -> None:
    """Refuse what the table does not hold.

    Raises:
        ValueError: names the field of config.json.
    """
    heads, keys = hf["num_attention_heads"], hf.get("num_key_value_heads")
    if keys not in (None, heads):
        raise ValueError(
            f"config.json num_key_value_heads={keys} is not supported with multi-latent attention; "
            f"only num_attention_heads={heads}, as every head has a key of its own"
        )
    if hf.get("rope_interleave", True) is False:
        raise ValueError(
            "config.json rope_interleave=false is not supported: Megatron-Core rotates "
            "neighbouring channels of multi-latent attention; only true"
        )
    rotated, whole = hf["qk_rope_head_dim"], hf["qk_rope_head_dim"] + hf["qk_nope_head_dim"]
    for key, only in (("head_dim", rotated), ("qk_head_dim", whole)):
        if hf.get(key) not in (None, only):
            raise ValueError(
                f"config.json {key}={hf[key]} is not supported; only {only}, as qk_rope_head_dim="
                f"{rotated} and qk_nope_head_dim={hf['qk_nope_head_dim']} say"
            )


def from_hf(known: dict[str, Any], family: str) -> ModelConfig:
    """Return sizes of a network without experts; other keys are not looked at.

    Args:
        known: config.json with the defaults of the family.
        family: name of the family.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    _refuse(known)
    dense = llama.dense({**known, "head_dim": known["v_head_dim"]}, _rope(known))
    return replace(
        dense,
        family=family,
        num_query_groups=dense.num_attention_heads,
        qk_layernorm=True,
        **{name: known[key] for name, key in NAMES.items()},
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json about these sizes; transformers derives ``head_dim``."""
    written = llama.to_hf(config)
    del written["head_dim"]
    written |= {key: getattr(config, name) for name, key in NAMES.items()}
    return written | {"v_head_dim": config.kv_channels}

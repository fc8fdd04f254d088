"""GPT-2: learned positions, LayerNorm, biases everywhere, every head with its own key and value.

Hugging Face stores the weights of linear layers transposed (``Conv1D``, ``[in, out]``), query, key
and value in one of them. Its config has no head dim, which is always ``n_embd / n_head``: so
``hidden_size`` and heads cannot be pruned.
"""

from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.config_json import check_keys, words
from nemo_minitron.families.llama import untied
from nemo_minitron.families.nemotron import norm_bias
from nemo_minitron.families.table import Family, Row

_LAYER = "decoder.layers.{layer}."
_HF = "transformer."
_HF_LAYER = _HF + "h.{layer}."


_NORMS = (
    Row("decoder.final_layernorm.weight", ("hidden",), None, (_HF + "ln_f.weight",)),
    Row(
        _LAYER + "input_layernorm.weight",
        ("hidden",),
        None,
        (_HF_LAYER + "ln_1.weight",),
        te_name=_LAYER + "self_attention.linear_qkv.layer_norm_weight",
    ),
    Row(
        _LAYER + "pre_mlp_layernorm.weight",
        ("hidden",),
        None,
        (_HF_LAYER + "ln_2.weight",),
        te_name=_LAYER + "mlp.linear_fc1.layer_norm_weight",
    ),
)


def _linear(
    name: str, dims: tuple[str, str], tp_dim: int, hf: str, form: str, bias_form: str | None = None
) -> tuple[Row, Row]:
    """Return weight and bias; the bias is split where the weight is split by rows."""
    weight = Row(
        _LAYER + name + ".weight", dims, tp_dim, (_HF_LAYER + hf + ".weight",), hf_form=form
    )
    split = 0 if tp_dim == 0 else None
    bias = Row(
        _LAYER + name + ".bias", dims[:1], split, (_HF_LAYER + hf + ".bias",), hf_form=bias_form
    )
    return weight, bias


ROWS = (
    Row("embedding.word_embeddings.weight", ("vocab", "hidden"), 0, (_HF + "wte.weight",)),
    Row(
        "embedding.position_embeddings.weight", ("position", "hidden"), None, (_HF + "wpe.weight",)
    ),
    Row("output_layer.weight", ("vocab", "hidden"), 0, ("lm_head.weight",), when=untied),
    *_NORMS,
    *(norm_bias(row) for row in _NORMS),
    *_linear(
        "self_attention.linear_qkv",
        ("qkv", "hidden"),
        0,
        "attn.c_attn",
        "packed_qkv_transposed",
        "packed_qkv",
    ),
    *_linear("self_attention.linear_proj", ("hidden", "head"), 1, "attn.c_proj", "transposed"),
    *_linear("mlp.linear_fc1", ("ffn", "hidden"), 0, "mlp.c_fc", "transposed"),
    *_linear("mlp.linear_fc2", ("hidden", "ffn"), 1, "mlp.c_proj", "transposed"),
)

# transformers' names of the activation -> ours.
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_HF_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu"}
READS = words(
    "vocab_size n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon "
    "tie_word_embeddings scale_attn_weights scale_attn_by_inverse_layer_idx add_cross_attention "
    "reorder_and_upcast_attn"
)
# Attention as every other family has it.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "reorder_and_upcast_attn": False,
}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face GPT-2 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("gpt2", hf, READS)
    for key, value in _FIXED.items():
        if hf.get(key, value) != value:
            raise ValueError(
                f"config.json {key}={str(hf[key]).lower()} is not supported; only "
                f"{str(value).lower()}"
            )
    name = hf.get("activation_function", "gelu_new")
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"config.json activation_function={name} is not supported; only {sorted(_ACTIVATIONS)}"
        )
    heads, hidden = hf["n_head"], hf["n_embd"]
    if hidden % heads:
        raise ValueError(f"config.json n_embd={hidden} must be a multiple of n_head={heads}")
    return ModelConfig(
        family="gpt2",
        num_layers=hf["n_layer"],
        hidden_size=hidden,
        ffn_hidden_size=hf.get("n_inner") or 4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        kv_channels=hidden // heads,
        vocab_size=hf["vocab_size"],
        max_position_embeddings=hf.get("n_positions", 1024),
        normalization="LayerNorm",
        layernorm_epsilon=hf.get("layer_norm_epsilon", 1e-5),
        gated_linear_unit=False,
        activation=_ACTIVATIONS[name],
        add_bias_linear=True,
        add_qkv_bias=True,
        position_embedding_type="learned_absolute",
        share_embeddings_and_output_weights=hf.get("tie_word_embeddings", True),
        dtype=hf.get("dtype") or hf.get("torch_dtype") or "float32",
        hf=dict(hf),
    )


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model; ``n_inner`` is always written."""
    return {
        **{key: value for key, value in config.hf.items() if key not in READS},
        **_FIXED,
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.max_position_embeddings,
        "n_embd": config.hidden_size,
        "n_layer": config.num_layers,
        "n_head": config.num_attention_heads,
        "n_inner": config.ffn_hidden_size,
        "activation_function": _HF_ACTIVATIONS[config.activation],
        "layer_norm_epsilon": config.layernorm_epsilon,
        "tie_word_embeddings": config.share_embeddings_and_output_weights,
        "torch_dtype": config.dtype,
    }


GPT2 = Family(
    "gpt2",
    {"GPT2LMHeadModel": "gpt2"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="GPT-2",
    refuses=(
        "`scale_attn_by_inverse_layer_idx=true`, `scale_attn_weights=false`, cross attention",
        "`activation_function` other than a GELU",
        "sequences longer than `n_positions`: positions are learned",
    ),
    prunable=("num_layers", "ffn_hidden_size"),
    why_not_prunable=(
        "a GPT-2 config.json has no head dim, which is always n_embd / n_head, so transformers "
        "could not open the result"
    ),
    hf_prefix=_HF,
)

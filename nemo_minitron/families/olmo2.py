"""OLMo-2: norms after attention and MLP in place of before, queries and keys normalised as a whole.

Its modules are in ``models/olmo2_spec.py``. Pruned heads take their part of the weights of the
query and key norms with them, and the mean square is then that of the heads that stay.
``qk_layernorm`` stays false: it is Megatron's word for one weight per head dim that every rank
holds whole, the gradients of which Megatron sums over the tensor-parallel ranks.
"""

from dataclasses import replace
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families import llama
from nemo_minitron.families.config_json import check_keys
from nemo_minitron.families.rope import REFUSED_SCALINGS
from nemo_minitron.families.table import Family, Row

_LAYER, _HF_LAYER = "decoder.layers.{layer}.", "model.layers.{layer}."


def _norm(name: str, dim: str, tp_dim: int | None, hf: str) -> Row:
    return Row(f"{_LAYER}{name}.weight", (dim,), tp_dim, (f"{_HF_LAYER}{hf}.weight",))


ROWS = (
    *(row for row in llama.ROWS if not (row.per_layer and "layernorm" in row.name)),
    _norm("self_attention.q_layernorm", "head", 0, "self_attn.q_norm"),
    _norm("self_attention.k_layernorm", "query_group", 0, "self_attn.k_norm"),
    _norm("self_attention.linear_proj.post_layernorm", "hidden", None, "post_attention_layernorm"),
    _norm("mlp.linear_fc2.post_layernorm", "hidden", None, "post_feedforward_layernorm"),
)
READS = llama.READS - {"sliding_window", "mlp_bias"}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Return the Megatron sizes of a Hugging Face OLMo-2 config.

    Raises:
        ValueError: the config asks for something this table does not hold.
    """
    check_keys("olmo2", hf, READS)
    sizes = llama.dense({"rms_norm_eps": 1e-5, **hf})
    return replace(sizes, family="olmo2", hf=dict(hf))


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Return the config.json of a (pruned) model."""
    return {
        **llama.to_hf(config),
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "attention_bias": False,
    }


OLMO2 = Family(
    "olmo2",
    {"Olmo2ForCausalLM": "olmo2"},
    ROWS,
    from_hf,
    to_hf,
    READS,
    models="OLMo-2",
    refuses=(
        *REFUSED_SCALINGS,
        "`attention_bias=true`: the table has no biases",
    ),
    layer_spec="nemo_minitron.models.olmo2_spec:block_spec",
)

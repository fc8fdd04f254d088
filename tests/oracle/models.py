"""The models that ModelOpt and this package both prune."""

from dataclasses import replace

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.llama import LLAMA as LLAMA_FAMILY
from nemo_minitron.families.llama import ROWS
from nemo_minitron.families.table import Row
from tests.helpers.tiny import LLAMA


def _layernorm_rows() -> tuple[Row, ...]:
    """Llama's rows, with a bias to every norm and no gate."""
    rows = []
    for row in ROWS:
        gated = row.dims == ("gate_up", "hidden")
        rows.append(replace(row, dims=("ffn", "hidden")) if gated else row)
        if row.name.endswith("layernorm.weight"):
            te_name = row.te_name and row.te_name.replace("weight", "bias")
            rows.append(replace(row, name=row.name.replace("weight", "bias"), te_name=te_name))
    return tuple(rows)


# Grouped-query attention, RMSNorm, SwiGLU, untied embeddings.
RMSNORM = LLAMA
# As Nemotron-4: LayerNorm with biases, squared ReLU without a gate, half of each head rotated; and
# tied embeddings.
LAYERNORM = ModelConfig(
    family="llama",  # its layers, with other norms
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=128,
    num_attention_heads=8,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=97,
    max_position_embeddings=64,
    normalization="LayerNorm",
    gated_linear_unit=False,
    activation="squared_relu",
    rotary_percent=0.5,
    share_embeddings_and_output_weights=True,
)
MODELS = {
    "rmsnorm": (RMSNORM, LLAMA_FAMILY),
    "layernorm": (LAYERNORM, replace(LLAMA_FAMILY, rows=_layernorm_rows())),
}

"""Layers for multi-token prediction (MTP): their rows, and their part of config.json.

They come after the last layer of the model and are like it inside (docs/design/mtp.md). In the
names of rows ``{mtp}`` stands for their number: 0-based in Megatron-Core, counted on from the
layers of the model in Hugging Face folders, where each also holds copies of what it shares with the
model.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.table import ON_DISK, PREDICTION, Row

MTP_LAYERS = "num_nextn_predict_layers"
"""Key of config.json: how many such layers there are."""
REFUSED_LAYERS = (
    f"more than one layer for multi-token prediction (`{MTP_LAYERS}`), and pruning sizes inside of "
    f"it; `source_ignore=[{MTP_LAYERS}]` leaves it out"
)
"""What the documentation says of layers for multi-token prediction."""
_LAYER, _HF_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}.", "model.layers.{mtp}."
_MTP = PREDICTION + "{mtp}."
_COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}
_WAY_OUT = f"set source_ignore=[{MTP_LAYERS}] to leave the layers out"
LEFT_OUT = f"; they are of layers for multi-token prediction, which no row holds: {_WAY_OUT}"
"""What to say of such tensors in a family that has none (``Family.left_out``)."""


def _has_layers(config: ModelConfig) -> bool:
    return config.mtp_num_layers is not None


def _own(name: str, dims: tuple[str, ...], tp_dim: int | None, hf: str) -> Row:
    return Row(f"{_MTP}{name}.weight", dims, tp_dim, (f"{_HF}{hf}.weight",), when=_has_layers)


_OWN = (
    _own("enorm", ("hidden",), None, "enorm"),
    _own("hnorm", ("hidden",), None, "hnorm"),
    _own("eh_proj", ("hidden", "hidden_twice"), 0, "eh_proj"),
    _own("final_layernorm", ("hidden",), None, "shared_head.norm"),
)


def prediction_rows(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Return rows of the layers for multi-token prediction of a family.

    Args:
        rows: those of its other parameters.
    """
    return (*_OWN, *(_inner(row) for row in rows if row.per_layer))


def _inner(row: Row) -> Row:
    """Return the row of a parameter of the layer inside."""
    inside, on_disk = f"{_MTP}mtp_model_layer.", f"{_MTP}{ON_DISK}"
    stored = row.stored_as and row.stored_as.replace(_LAYER, on_disk)
    return replace(
        row,
        name=row.name.replace(_LAYER, inside),
        te_name=(row.te_name or row.name).replace(_LAYER, on_disk),
        stored_as=stored,
        hf=tuple(name.replace(_HF_LAYER, _HF) for name in row.hf),
        when=partial(_both, row),
    )


def _both(row: Row, config: ModelConfig) -> bool:
    return _has_layers(config) and row.when(config)


def copies(config: ModelConfig) -> dict[str, str]:
    """Return Hugging Face name of every copy in these layers -> what it is a copy of."""
    numbers = range(config.num_layers, config.num_layers + (config.mtp_num_layers or 0))
    return {
        f"model.layers.{number}.{name}": original
        for number in numbers
        for name, original in _COPIES.items()
    }


def read_layers(hf: Mapping[str, Any]) -> int | None:
    """Return ``mtp_num_layers`` of a config.json.

    Raises:
        ValueError: there are more than Megatron-Core computes as these models do.
    """
    count = hf.get(MTP_LAYERS) or 0
    if count > 1:
        raise ValueError(
            f"config.json {MTP_LAYERS}={count} is not supported: a second layer of Megatron-Core "
            f"reads what the first one has normalised; only 0 or 1, or {_WAY_OUT}"
        )
    return count or None


def lacking(config: ModelConfig, names: Iterable[str]) -> str:
    """Return a message if a folder lacks only the tensors of these layers, else an empty text.

    Args:
        config: of the model.
        names: Hugging Face names of the tensors that are missing.
    """
    layers = range(config.num_layers, config.num_layers + (config.mtp_num_layers or 0))
    starts = tuple(f"model.layers.{number}." for number in layers)
    if not starts or not all(name.startswith(starts) for name in names):
        return ""
    return (
        f"; config.json counts {MTP_LAYERS}={config.mtp_num_layers}, but the weights were saved "
        f"without (as transformers does): {_WAY_OUT}"
    )


def differs(copy: str, original: str) -> str:
    """Return a message for a tensor that should equal the original but does not."""
    return (
        f"{copy} is not equal to {original}, which layers for multi-token prediction share with "
        f"the model; {_WAY_OUT}"
    )

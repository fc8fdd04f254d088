"""How a model came to be: ``lineage.json`` beside its weights, an entry per stage it went through.

Every stage that writes a model copies the entries of the one it read and adds its own
(``stages/recipe.py``); ``export`` writes the model card from them. The file says how, with the
names of folders and files, and is no part of a result's identity (``manifest.py``).
"""

import json
from pathlib import Path

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import JsonObject, read_json_object
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count

LINEAGE = "lineage.json"
_FORMAT = 1
SIZES = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_router_topk",
    "mamba_num_heads",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_state_dim",
    "kv_channels",
    "vocab_size",
    "max_position_embeddings",
    "dtype",
)


def model_sizes(config: ModelConfig) -> JsonObject:
    """The sizes that a model has, in the order of ``SIZES``; nothing about experts for others."""
    names = [name for name in SIZES if config.num_moe_experts or "moe" not in name]
    sizes = {name: getattr(config, name) for name in names}
    return {name: size for name, size in sizes.items() if size is not None}


def model_facts(config: ModelConfig) -> JsonObject:
    """What an entry says about the model that its stage wrote."""
    count = parameter_count(family_of(config), config)
    return {
        "family": config.family,
        "parameters": count["total"],
        "non_embedding_parameters": count["non_embedding"],
        "sizes": model_sizes(config),
    }


def read_lineage(folder: Path) -> list[JsonObject]:
    """Entries of a ``checkpoint/`` folder, oldest first; none where none were kept.

    Raises:
        ValueError: the file is damaged or of another version.
    """
    path = folder / LINEAGE
    if not path.is_file():
        return []
    values = read_json_object(path)
    if values.get("format") != _FORMAT or not _are_entries(values.get("stages")):
        raise ValueError(f"{path} is not a format-{_FORMAT} lineage; run the stage again")
    entries: list[JsonObject] = values["stages"]
    return entries


def _are_entries(stages: object) -> bool:
    return isinstance(stages, list) and all(
        isinstance(entry, dict) and isinstance(entry.get("stage"), str) for entry in stages
    )


def record(source: Path | None, folder: Path, entry: JsonObject) -> None:
    """Write the lineage of a new model.

    Args:
        source: ``checkpoint/`` folder of the model it was made from, or None if it was imported.
        folder: its own.
        entry: of the stage that made it.
    """
    entries = [] if source is None else read_lineage(source)
    text = json.dumps({"format": _FORMAT, "stages": [*entries, entry]}, indent=1)
    (folder / LINEAGE).write_text(text + "\n")

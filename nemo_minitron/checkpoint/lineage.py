"""Where a model comes from: the stages it went through, and what its first source says of itself.

``lineage.json`` beside the weights has an entry for every stage. A stage that writes a model copies
the entries of the one it read and adds its own (``stages/recipe.py``); ``export`` writes the model
card from them. The file says how, with the names of folders and files, and is no part of a result's
identity (``manifest.py``). The source's licence comes from its model card or GGUF metadata.
"""

import json
import logging
import shutil
from pathlib import Path

from nemo_minitron.checkpoint.inside import inside
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import JsonObject, read_json_object, yaml_value
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count

logger = logging.getLogger(__name__)

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
README = "README.md"
# Keys of a model card, which exporting carries over; GGUF has them with dots.
LICENCE_KEYS = ("license", "license_name", "license_link")
_TEXTS = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")


def model_sizes(config: ModelConfig) -> JsonObject:
    """The sizes that a model has, in the order of ``SIZES``; nothing about experts for others."""
    names = [name for name in SIZES if config.num_moe_experts or "moe" not in name]
    sizes = {name: getattr(config, name) for name in names}
    return {name: size for name, size in sizes.items() if size is not None}


def model_facts(config: ModelConfig) -> JsonObject:
    """Return the facts that an entry holds about the model that its stage wrote."""
    count = parameter_count(family_of(config), config)
    return {
        "family": config.family,
        "parameters": count["total"],
        "non_embedding_parameters": count["non_embedding"],
        "sizes": model_sizes(config),
    }


def read_lineage(folder: Path) -> list[JsonObject]:
    """Return entries of a ``checkpoint/`` folder, oldest first; none where none were kept.

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


def read_source_card(source: Path) -> JsonObject:
    """Name, format and licence of a model.

    Args:
        source: what ``import`` opens.

    Returns:
        ``name`` (of the folder or file), ``format``, and those of ``LICENCE_KEYS`` that the source
        gives.
    """
    if source.is_dir():
        hugging_face = (source / "config.json").is_file()
        return {
            "name": source.resolve().name,
            "format": "Hugging Face" if hugging_face else "Megatron",
            **_licence(front_matter(source / README)),
        }
    if source.suffix == ".nemo":
        return {"name": source.name, "format": "NeMo"}
    from nemo_minitron.checkpoint.gguf import fields_of

    get = fields_of(source)
    fields = {key: get("general." + key.replace("_", "."), None) for key in LICENCE_KEYS}
    return {"name": source.name, "format": "GGUF", **_licence(fields)}


def _licence(fields: JsonObject) -> JsonObject:
    """Return the licence that a model card states: a word, or several."""
    return {key: fields[key] for key in LICENCE_KEYS if isinstance(fields.get(key), str | list)}


def front_matter(readme: Path) -> JsonObject:
    """Return the YAML between the ``---`` lines that a model card begins with, if it has any."""
    if not readme.is_file():
        return {}
    lines = readme.read_text(encoding="utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    ends = [number for number, line in enumerate(lines[1:], 1) if line.strip() == "---"]
    try:
        values = yaml_value("\n".join(lines[1 : ends[0]])) if ends else None
    except ValueError as error:
        logger.warning("%s: the licence was not read from its first lines: %s", readme, error)
        return {}
    return values if isinstance(values, dict) else {}


def copy_licence_texts(source: Path, folder: Path) -> list[str]:
    """Copy the files that a licence may ask to be passed on; returns their names."""
    found = sorted({path for pattern in _TEXTS for path in source.glob(pattern) if path.is_file()})
    for path in found:
        shutil.copyfile(inside(source, path.name), folder / path.name)
    return [path.name for path in found]

"""Looks families up by name or by Hugging Face architecture."""

from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.llama import LLAMA
from nemo_minitron.families.mixtral import MIXTRAL
from nemo_minitron.families.qwen2_moe import QWEN2_MOE
from nemo_minitron.families.table import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (LLAMA, MIXTRAL, QWEN2_MOE)}


def family_of(config: ModelConfig) -> Family:
    """Family of a stored model."""
    if config.family not in FAMILIES:
        raise ValueError(f"family '{config.family}' is unknown; known: {sorted(FAMILIES)}")
    return FAMILIES[config.family]


def family_of_hf(hf_config: dict[str, Any]) -> Family:
    """Family of a Hugging Face config.json.

    Raises:
        ValueError: no family lists its architecture.
    """
    names = hf_config.get("architectures") or []
    for family in FAMILIES.values():
        if set(names) & set(family.hf_architectures):
            return family
    known = sorted(name for family in FAMILIES.values() for name in family.hf_architectures)
    raise ValueError(
        f"architectures={names} in config.json is not supported; supported: {known}; set source to "
        "such a model"
    )

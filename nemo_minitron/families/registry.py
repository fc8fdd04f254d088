"""Looks families up by name or by Hugging Face architecture."""

from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.gpt2 import GPT2
from nemo_minitron.families.llama import LLAMA
from nemo_minitron.families.mixtral import MIXTRAL
from nemo_minitron.families.nemotron import NEMOTRON
from nemo_minitron.families.phi3 import PHI3
from nemo_minitron.families.qwen import QWEN2, QWEN3
from nemo_minitron.families.qwen2_moe import QWEN2_MOE
from nemo_minitron.families.qwen3_moe import QWEN3_MOE
from nemo_minitron.families.table import Family

_ALL = (LLAMA, QWEN2, QWEN3, NEMOTRON, PHI3, GPT2, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}

_GEMMA = (
    "embeddings are multiplied by sqrt(hidden_size), which Megatron-Core 0.16's GPT model has no "
    "switch for"
)
_GEMMA2 = (
    f"{_GEMMA}; nor has it norms after attention and MLP, caps on the logits (Gemma 2), or a "
    "rotary base for each kind of layer (Gemma 3)"
)
UNSUPPORTED: dict[str, str] = {
    "GemmaForCausalLM": _GEMMA,
    "Gemma2ForCausalLM": _GEMMA2,
    "Gemma3ForCausalLM": _GEMMA2,
    "Gemma3ForConditionalGeneration": _GEMMA2,
}
"""Architectures that people ask for and Megatron-Core cannot run as they are, and why."""


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
    why = "".join(f" ({UNSUPPORTED[name]})" for name in names if name in UNSUPPORTED)
    raise ValueError(
        f"architectures={names} in config.json is not supported{why}; supported: {known}; set "
        "source to such a model"
    )

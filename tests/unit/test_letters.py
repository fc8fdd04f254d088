"""GPT families as HybridModel: the same tensors in layers of one letter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.checkpoint.hf_checks import expected_tensors
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of
from tests.helpers.tiny import (
    GPT2,
    LLAMA,
    MIXTRAL,
    NEMOTRON,
    NEMOTRON_H,
    QWEN2_MOE,
    QWEN3,
    SMOLLM3,
    write_weights,
)

MODELS = (LLAMA, QWEN3, SMOLLM3, NEMOTRON, GPT2, MIXTRAL, QWEN2_MOE)
OWN = (
    "olmo2 granite gemma2 gemma3 deepseek_v2 deepseek_v3 gpt_oss ministral3 qwen3_next "
    "qwen3_5 qwen3_5_moe"
)
"""Families whose layers are not those that Megatron-Core's stack of letters makes."""


def in_letters(config: ModelConfig, pattern: str) -> ModelConfig:
    no_rope = config.no_rope_freq and [entry for entry in config.no_rope_freq for _ in "*-"]
    layers = len(pattern)
    return replace(config, num_layers=layers, hybrid_layer_pattern=pattern, no_rope_freq=no_rope)


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.family)
def test_hugging_face_is_that_of_the_gpt_model(config: ModelConfig) -> None:
    letters = in_letters(config, ("*E" if config.num_moe_experts else "*-") * config.num_layers)

    def tensors(config: ModelConfig) -> dict[str, Any]:
        found = expected_tensors(family_of(config), config)
        return {name: (shape, row.dims, row.tp_dim) for name, (shape, row) in found.items()}

    assert tensors(letters) == tensors(config)
    assert family_of(letters).to_hf(letters) == family_of(config).to_hf(config)


def test_names_are_those_of_a_hybrid_model() -> None:
    config = in_letters(LLAMA, "*-*-")
    names = {name for name, *_ in family_of(config).parameters(config)}
    assert "decoder.final_norm.weight" in names
    assert "decoder.layers.3.mlp.linear_fc1.weight" in names
    assert not any(".1.self_attention" in name or ".2.mlp" in name for name in names)


def test_a_torn_pair_has_no_hugging_face_format(tmp_path: Path) -> None:
    config = in_letters(LLAMA, "*--*")
    says = r"hybrid_layer_pattern=\*--\* has no Hugging Face format"
    with pytest.raises(ValueError, match=says):
        family_of(config).to_hf(config)
    write_weights(tmp_path / "torn", config, seed=0)
    with pytest.raises(ValueError, match=says):
        open_source(str(tmp_path / "torn"))


@pytest.mark.parametrize("pattern", ["M*-", "*-*E"])
def test_letters_that_a_family_does_not_have_are_refused(pattern: str) -> None:
    sizes = {name: getattr(NEMOTRON_H, name) for name in vars(NEMOTRON_H) if "mamba" in name}
    config = in_letters(replace(MIXTRAL, **sizes), pattern)
    with pytest.raises(ValueError, match="is not supported for family 'mixtral'"):
        family_of(config)


@pytest.mark.parametrize("name", OWN.split())
def test_families_with_modules_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"is not supported for family '{name}'"):
        family_of(in_letters(replace(LLAMA, family=name), "*-"))

"""GPT families as HybridModel: the same tensors in layers of one letter."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nemo_minitron
from nemo_minitron.checkpoint.hf_checks import expected_tensors
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportConfig
from nemo_minitron.families import letters
from nemo_minitron.families.registry import family_of
from nemo_minitron.planning.models import source_model
from nemo_minitron.stages import import_
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


def spelled(config: ModelConfig, pattern: str) -> ModelConfig:
    return replace(config, num_layers=len(pattern), hybrid_layer_pattern=pattern)


@pytest.mark.parametrize("config", MODELS, ids=lambda config: config.family)
def test_hugging_face_is_that_of_the_gpt_model(config: ModelConfig) -> None:
    apart = letters.in_letters(config)

    def tensors(config: ModelConfig) -> dict[str, Any]:
        found = expected_tensors(family_of(config), config)
        return {name: (shape, row.dims, row.tp_dim) for name, (shape, row) in found.items()}

    assert tensors(apart) == tensors(config)
    assert family_of(apart).to_hf(apart) == family_of(config).to_hf(config)


def test_import_makes_letters_and_export_pairs(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=3, **sizes))
    model.save_pretrained(tmp_path / "hf")
    cfg = ImportConfig(
        source=str(tmp_path / "hf"), output_dir=str(tmp_path / "letters"), as_hybrid=True
    )
    import_.check(cfg)
    import_.run(cfg)
    config = ModelConfig.load(tmp_path / "letters" / "checkpoint")
    assert (config.hybrid_layer_pattern, config.num_layers) == ("*-*-*-", 6)
    assert config == source_model(cfg)
    nemo_minitron.export(tmp_path / "letters", tmp_path / "again")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "again").state_dict()
    assert again.keys() == model.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_a_hybrid_stays_what_it_is(tmp_path: Path) -> None:
    write_weights(tmp_path / "model", spelled(LLAMA, "*-*-"), seed=0)
    opened = [open_source(str(tmp_path / "model"), as_hybrid=wanted) for wanted in (False, True)]
    assert opened[0].config == opened[1].config
    assert opened[0].store.keys() == opened[1].store.keys()


def test_a_scaling_that_hybrid_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="as_hybrid=true is not supported for a model with rope"):
        letters.in_letters(replace(LLAMA, rope_scaling={"rope_type": "llama3", "factor": 8.0}))


def test_names_are_those_of_a_hybrid_model() -> None:
    config = spelled(LLAMA, "*-*-")
    names = {name for name, *_ in family_of(config).parameters(config)}
    assert "decoder.final_norm.weight" in names
    assert "decoder.layers.3.mlp.linear_fc1.weight" in names
    assert not any(".1.self_attention" in name or ".2.mlp" in name for name in names)


def test_a_torn_pair_has_no_hugging_face_format(tmp_path: Path) -> None:
    config = spelled(LLAMA, "*--*")
    says = r"hybrid_layer_pattern=\*--\* has no Hugging Face format"
    with pytest.raises(ValueError, match=says):
        family_of(config).to_hf(config)
    write_weights(tmp_path / "torn", config, seed=0)
    with pytest.raises(ValueError, match=says):
        open_source(str(tmp_path / "torn"))


@pytest.mark.parametrize("pattern", ["M*-", "*-*E"])
def test_letters_that_a_family_does_not_have_are_refused(pattern: str) -> None:
    sizes = {name: getattr(NEMOTRON_H, name) for name in vars(NEMOTRON_H) if "mamba" in name}
    config = spelled(replace(MIXTRAL, **sizes), pattern)
    with pytest.raises(ValueError, match="is not supported for family 'mixtral'"):
        family_of(config)


@pytest.mark.parametrize("name", OWN.split())
def test_families_with_modules_of_their_own_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"is not supported for family '{name}'"):
        family_of(spelled(replace(LLAMA, family=name), "*-"))

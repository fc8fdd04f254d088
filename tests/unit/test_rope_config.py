"""Rotary positions of config.json: read as transformers reads them, or refused."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_minitron.checkpoint.foreign.megatron_fields import model_fields
from nemo_minitron.checkpoint.foreign.megatron_stated import of_args
from nemo_minitron.checkpoint.megatron_args import megatron_lm_args
from nemo_minitron.families.registry import FAMILIES, family_of
from nemo_minitron.models.rotary import frequencies, frequencies_by_length
from tests.helpers.tiny import LLAMA, MIXTRAL, NEMOTRON, PHI3_LONG
from tests.unit.test_families import LLAMA3_ROPE
from tests.unit.test_family_configs import PHI3

SCALED = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_type"}
ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
CASES: list[tuple[Any, dict[str, Any]]] = [
    (LLAMA, {}),
    (LLAMA, {"rope_theta": 5e5}),
    (LLAMA, {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}),
    (LLAMA, {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALED}}),
    (LLAMA, {"rope_parameters": {"rope_theta": 5e5, **LLAMA3_ROPE}}),
    (LLAMA, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": 5e5}),
    (LLAMA, {"rope_parameters": {"rope_type": "default"}, "rope_theta": 7e5}),
    # rope_scaling is taken whole, so that the base inside the other is not seen
    (LLAMA, {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": LLAMA3_ROPE}),
    (LLAMA, {"rope_scaling": {"rope_type": "default", "factor": 8.0}}),
    (LLAMA, {"rope_scaling": {}, "rope_parameters": {"rope_theta": 3e4, "rope_type": "default"}}),
    (MIXTRAL, {}),
    (MIXTRAL, {"rope_parameters": {"rope_type": "default"}}),
    (MIXTRAL, {"rope_theta": 3e4}),
    (NEMOTRON, {}),
    (NEMOTRON, {"rope_percent": 0.25}),
    (NEMOTRON, {"rope_percent": 0.25, "partial_rotary_factor": 0.75}),
    (NEMOTRON, {"rope_percent": 0.25, "rope_parameters": {"rope_theta": 3e4}}),
    (NEMOTRON, {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}}),
    (NEMOTRON, {"partial_rotary_factor": None}),
    (PHI3, {}),
    (PHI3, {"partial_rotary_factor": 0.5, "rope_percent": 0.25}),
    (PHI3, {"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.5}}),
]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
STRETCHED: list[tuple[Any, dict[str, Any]]] = [
    (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    (NEMOTRON, {"rope_parameters": {"rope_type": "linear", "factor": 3, "rope_theta": 5e5}}),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    (LLAMA, {"rope_scaling": YARN}),
    (LLAMA, {"rope_scaling": {k: v for k, v in YARN.items() if "original" not in k}}),
    (LLAMA, {"rope_scaling": YARN, "original_max_position_embeddings": 64}),
    (MIXTRAL, {"rope_parameters": {**YARN, "rope_theta": 5e5, "beta_fast": 8, "beta_slow": 2}}),
    (LLAMA, {"rope_scaling": {**YARN, "truncate": False, "beta_fast": None}}),
    (LLAMA, {"rope_scaling": {**YARN, "attention_factor": 1.25}}),
    (LLAMA, {"rope_scaling": {**YARN, "attention_factor": 0.5, "mscale": 1.0}}),
    (LLAMA, {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    (LLAMA, {"rope_scaling": {**YARN, "mscale": 0.7}}),
    (LLAMA, {"rope_scaling": {**YARN, "factor": 1.0}}),
]


@pytest.mark.parametrize(("config", "change"), STRETCHED)
def test_scaled_frequencies_are_those_of_transformers(config, change):
    hf = written(config, change)
    theirs = AutoConfig.for_model(**deepcopy(hf))
    kind = theirs.rope_parameters["rope_type"]
    wanted, factor = ROPE_INIT_FUNCTIONS[kind](theirs)
    mine = FAMILIES[config.family].from_hf(deepcopy(hf))
    assert mine.rotary_base == theirs.rope_parameters["rope_theta"]
    found = frequencies(mine)
    if kind == "dynamic":
        assert found is None
        dim = mine.kv_channels
        found = 1.0 / mine.rotary_base ** (torch.arange(0, dim, 2).float() / dim)
        assert mine.max_seq_length == mine.max_position_embeddings
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert (mine.rope_scaling or {}).get("attention_factor", 1.0) == factor
    again = FAMILIES[config.family].from_hf(FAMILIES[config.family].to_hf(mine))
    assert again.rope_scaling == mine.rope_scaling


LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.25, 1.5],
    "long_factor": [1.0, 4.0, 9.5],
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "change", [{}, {"factor": 8.0}, {"attention_factor": 1.3}, {"factor": 0.5, "type": "longrope"}]
)
def test_longrope_is_that_of_transformers(change):
    """Frequencies of both lengths, and the factor of sines and cosines that Megatron is told."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as megatron

    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.models.build import transformer_config

    said = {"partial_rotary_factor": 0.75, "original_max_position_embeddings": 32}
    hf = written(PHI3_LONG, {**said, "rope_scaling": {**LONGROPE, **change}})
    theirs = AutoConfig.for_model(**deepcopy(hf))
    mine = FAMILIES["phi3"].from_hf(deepcopy(hf))
    for length, found in zip((32, 33), frequencies_by_length(mine), strict=True):
        wanted, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, seq_len=length)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    core = transformer_config(mine, ParallelConfig(), torch.float32)
    told = megatron._yarn_get_concentration_factor_from_config(core)
    assert told == pytest.approx(factor, rel=1e-12)
    again = FAMILIES["phi3"].from_hf(FAMILIES["phi3"].to_hf(mine))
    stated = of_args(vars(megatron_lm_args(mine)), "here")
    read = model_fields(stated, mine.vocab_size)["rope_scaling"]
    assert again.rope_scaling == mine.rope_scaling == read


@pytest.mark.parametrize(("config", "change"), STRETCHED)
def test_megatron_is_told_the_same(config, change):
    """Its factor of sines and cosines, and the arguments of Megatron-LM with their way back."""
    from megatron.core.models.common.embeddings import yarn_rotary_pos_embedding as megatron

    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.models.build import transformer_config

    mine = FAMILIES[config.family].from_hf(written(config, change))
    scaling = mine.rope_scaling or {}
    core = transformer_config(mine, ParallelConfig(), torch.float32)
    factor = megatron._yarn_get_concentration_factor_from_config(core)
    assert factor == pytest.approx(scaling.get("attention_factor", 1.0), rel=1e-12)
    stated = of_args(vars(megatron_lm_args(mine)), "here")
    read = model_fields(stated, mine.vocab_size)["rope_scaling"]
    if scaling["rope_type"] == "dynamic":  # which no argument says, and which changes nothing
        assert read is None
    else:
        assert read.pop("rope_type") == scaling["rope_type"]
        assert read == pytest.approx({k: v for k, v in scaling.items() if k != "rope_type"})


def test_yarn_of_megatron_is_that_of_transformers():
    """The frequencies with which Megatron-LM runs what it finds in the arguments."""
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_find_correction_range,
        _yarn_linear_ramp_mask,
    )

    mine = FAMILIES["llama"].from_hf(written(LLAMA, {"rope_scaling": YARN}))
    said, dim = megatron_lm_args(mine), mine.kv_channels
    turns = said.yarn_beta_fast, said.yarn_beta_slow
    length = said.yarn_original_max_position_embeddings
    low, high = _yarn_find_correction_range(*turns, dim, said.rotary_base, length, True)
    mask = _yarn_linear_ramp_mask(low, high, dim // 2, torch.device("cpu"))
    plain = 1.0 / said.rotary_base ** (torch.arange(0, dim, 2).float() / dim)
    wanted = plain / said.yarn_rotary_scaling_factor * mask + plain * (1 - mask)
    torch.testing.assert_close(frequencies(mine), wanted, rtol=1e-6, atol=0)


def written(config: Any, change: dict[str, Any]) -> dict[str, Any]:
    """config.json of a family with another rotation."""
    hf = family_of(config).to_hf(config)
    return {**{key: value for key, value in hf.items() if key not in ROPE_KEYS}, **change}


@pytest.mark.parametrize(("config", "change"), CASES)
def test_rotation_is_what_transformers_reads(config, change):
    hf = written(config, change)
    theirs = AutoConfig.for_model(**deepcopy(hf)).rope_parameters
    mine = FAMILIES[config.family].from_hf(deepcopy(hf))
    assert mine.rotary_base == theirs["rope_theta"]
    assert mine.rotary_percent == theirs.get("partial_rotary_factor", 1.0)
    scaled = theirs["rope_type"] == "llama3"
    assert mine.rope_scaling == ({key: theirs[key] for key in LLAMA3_ROPE} if scaled else None)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (
            LLAMA,
            {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
            r"gives rope_theta as 500000.0 and as 10000.0",
        ),
        (
            NEMOTRON,
            {"partial_rotary_factor": 0.5, "rope_parameters": {"partial_rotary_factor": 0.25}},
            r"gives partial_rotary_factor as 0.25 and as 0.5",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {**LLAMA3_ROPE, "factor": 32.0}},
            r"rope_scaling.factor=8.0 and rope_parameters.factor=32.0 disagree",
        ),
        (
            LLAMA,
            {"rope_scaling": {**LLAMA3_ROPE, "type": "linear"}},
            "rope_type=llama3 and type=linear",
        ),
        (
            LLAMA,
            {"rope_scaling": LLAMA3_ROPE, "original_max_position_embeddings": 4096},
            "original_max_position_embeddings=4096 is not supported",
        ),
        (
            LLAMA,
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "type llama3 lacks low_freq_factor",
        ),
        (
            LLAMA,  # which transformers fills with max_position_embeddings
            {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if "original" not in k}},
            "original_max_position_embeddings=128 is not supported",
        ),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        (LLAMA, {"rope_scaling": {"mscale": 0.7}}, r"rope_scaling holds \['mscale'\]"),
        (LLAMA, {"rope_scaling": "yarn"}, "rope_scaling='yarn' must be a dictionary or null"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            r"rope_parameters has a rotation for each of \['full_attention'\]",
        ),
        (PHI3, {"rope_scaling": LLAMA3_ROPE}, "is not supported"),
        (LLAMA, {"rope_scaling": {"type": "yarn"}}, "of type yarn lacks factor"),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' must be above 0"),
        (
            LLAMA,
            {"rope_scaling": {**YARN, "factor": 1.0, "attention_factor": 2.0}},
            "attention_factor=2.0 and factor=1.0, not supported",
        ),
        (
            NEMOTRON,
            {"partial_rotary_factor": 0.5, "rope_scaling": YARN},
            "type 'yarn' with partial_rotary_factor=0.5 is not supported",
        ),
    ],
)
def test_rotations_that_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[config.family].from_hf(written(config, change))

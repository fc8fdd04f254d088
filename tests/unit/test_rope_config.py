"""Rotary positions of config.json: read as transformers reads them, or refused."""

from copy import deepcopy
from typing import Any

import pytest
from transformers import AutoConfig

from nemo_minitron.families.registry import FAMILIES, family_of
from tests.helpers.tiny import LLAMA, MIXTRAL, NEMOTRON
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
        (LLAMA, {"rope_scaling": "yarn"}, "rope_scaling='yarn' is no dictionary"),
        (
            LLAMA,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            r"rope_parameters has a rotation for each of \['full_attention'\]",
        ),
        (PHI3, {"rope_scaling": LLAMA3_ROPE}, "is not supported"),
    ],
)
def test_rotations_that_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES[config.family].from_hf(written(config, change))

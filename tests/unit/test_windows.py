"""Sliding windows of config.json: which layers have them, as transformers reads it, or refused."""

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.checks import check_data
from nemo_minitron.families.registry import (
    family_of,
    longest_sequence,
    read_config,
    written_config,
)
from nemo_minitron.families.windows import megatron_fields
from tests.helpers.tiny import LLAMA, MIXTRAL, QWEN2_MOE, QWEN3, SMOLLM3
from tests.unit.test_family_configs import PHI3, QWEN2, QWEN3_MOE

MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
ON = {"use_sliding_window": True, "sliding_window": 6}
FULL, SLIDING = "full_attention", "sliding_attention"
TYPES = {"layer_types": [SLIDING, FULL, FULL, SLIDING]}
CASES: list[tuple[ModelConfig, dict[str, Any], list[int] | None]] = [
    (LLAMA, {**MISTRAL, "sliding_window": None}, None),
    (LLAMA, {**MISTRAL, "sliding_window": 6}, [6] * 4),
    (MIXTRAL, {"sliding_window": 6}, [6] * 4),
    (PHI3, {"sliding_window": 1}, [1] * 4),
    (PHI3, {}, None),
    (QWEN2, {}, None),
    (QWEN2, {**ON, "max_window_layers": 2}, [0, 0, 6, 6]),
    (QWEN2, {**ON, "use_sliding_window": False, "max_window_layers": 2}, None),
    (QWEN2, ON, None),
    (QWEN2, {**ON, **TYPES, "max_window_layers": 2}, [6, 0, 0, 6]),
    (QWEN3, {**ON, "max_window_layers": 0}, [6] * 4),
    (QWEN3, {**ON, "sliding_window": None, "max_window_layers": 0}, None),
    (QWEN3, {**ON, **TYPES}, [6, 0, 0, 6]),
    (SMOLLM3, {}, None),
    (SMOLLM3, ON, [0, 6, 6, 0]),  # the layers without rotation
    (SMOLLM3, {**ON, **TYPES}, [6, 0, 0, 6]),
    (QWEN2_MOE, {**ON, "max_window_layers": 3}, [6, 0, 6, 0]),
    (QWEN2_MOE, {**ON, **TYPES}, [6, 0, 0, 6]),
    (QWEN3_MOE, ON, [6] * 4),
]


def theirs(hf: dict[str, Any]) -> list[int]:
    """The windows of transformers' model, layer by layer."""
    with torch.device("meta"):
        config = AutoConfig.for_model(**{**deepcopy(hf), "pad_token_id": None})
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    if config.model_type in ("mistral", "mixtral", "phi3", "qwen3_moe"):
        return [window] * len(model.model.layers)
    found = [getattr(layer.self_attn, "sliding_window", None) or 0 for layer in model.model.layers]
    # of the attention, and of the mask
    assert [bool(w) for w in found] == [kind == SLIDING for kind in kinds or ()]
    return found


def source(config: ModelConfig, change: dict[str, Any]) -> dict[str, Any]:
    return {**family_of(config).to_hf(config), **change}


@pytest.mark.parametrize(("config", "change", "windows"), CASES)
def test_windows_are_those_of_transformers(config, change, windows):
    hf = source(config, change)
    family, mine = read_config(deepcopy(hf))
    assert mine.window_size == windows
    assert theirs(hf) == (windows or [0] * 4)
    # and back, whole and pruned, by way of transformers
    for kept in ([0, 1, 2, 3], [0, 2], [1, 3]):
        small = mine.resized({}, kept)
        written = written_config(small)
        assert theirs(written) == (small.window_size or [0] * len(kept))
        assert family.from_hf(written).window_size == small.window_size
        assert family.from_hf(family.to_hf(small)).window_size == small.window_size


def test_a_window_that_no_sequence_reaches_is_none():
    for change in ({**MISTRAL, "sliding_window": 128}, {"sliding_window": 128}):
        hf = source(LLAMA, change)
        assert read_config(hf)[1].window_size is None
        assert written_config(read_config(hf)[1])["sliding_window"] == 128


@pytest.mark.parametrize(
    ("config", "change", "longest"),
    [
        (LLAMA, {**MISTRAL, "sliding_window": 128}, 128),
        (PHI3, {"sliding_window": 300}, 300),
        (QWEN2, {**ON, "sliding_window": 200, "max_window_layers": 2}, 200),
        (QWEN2, {"sliding_window": 200}, None),  # use_sliding_window is false
        (LLAMA, {"sliding_window": 200}, None),  # which transformers' Llama does not have
        (LLAMA, {**MISTRAL, "sliding_window": 6}, None),  # it is in window_size
        (LLAMA, {}, None),
    ],
)
def test_sequences_that_would_meet_a_window_that_was_left_out(config, change, longest):
    """Up to there it is exact; beyond, transformers would show a token less of the text."""
    model = read_config(source(config, change))[1]
    assert longest_sequence(model) == longest
    if longest is not None:
        data = DataConfig(path="-", seq_length=longest + 1)
        with pytest.raises(ValueError, match=f"is longer than {longest}, .* a sliding_window abo"):
            check_data(data, max_seq_length=longest)


def test_releases_without_layer_types_read_the_same():
    """They go by ``max_window_layers``."""
    for windows in ([0, 0, 6, 6], [6] * 4):
        hf = family_of(QWEN3).to_hf(replace(QWEN3, window_size=windows))
        del hf["layer_types"]
        assert family_of(QWEN3).from_hf(hf).window_size == windows


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA, {"sliding_window": 6}, "sliding_window=6 of a Llama is not supported"),
        (LLAMA, {**MISTRAL, "sliding_window": 0}, "sliding_window=0 is not supported; only null"),
        (QWEN2, TYPES, "layer_types holds .* with use_sliding_window=false and sliding_window="),
        (SMOLLM3, {**TYPES, **ON, "sliding_window": None}, "use_sliding_window=true and .*=None"),
        (QWEN3, {"layer_types": [FULL, "chunked_attention"] * 2}, r"holds \['chunked_attention'\]"),
        (QWEN3, {"layer_types": [FULL] * 3}, "layer_types is of 3 layers, but num_hidden_layers=4"),
        (QWEN3_MOE, {**ON, **TYPES}, "all layers of a Qwen3-MoE have the window"),
    ],
)
def test_windows_that_are_refused(config, change, message):
    with pytest.raises(ValueError, match=message):
        family_of(config).from_hf(source(config, change))


@pytest.mark.parametrize("windows", [[6, 7, 0, 0], [-1, 0, 0, 0]])
def test_windows_have_one_width(windows):
    with pytest.raises(ValueError, match=r"window_size=\[.*only one number above 0"):
        replace(QWEN3, window_size=windows)


def test_megatron_sees_what_the_mask_shows(ranks):
    """Megatron counts what lies before the token, and its layers from 1."""
    from megatron.core.transformer.utils import is_layer_window_attention

    told = megatron_fields(replace(QWEN3, window_size=[0, 3, 3, 0]))
    assert told["window_size"] == (2, 0)
    assert [is_layer_window_attention(**told, layer_number=n) for n in (1, 2, 3, 4)] == [
        False,
        True,
        True,
        False,
    ]
    (seen,) = ranks.run(1, seen_keys, 5, 3)
    assert seen == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


def seen_keys(length: int, window: int) -> list[list[int]]:
    """The keys that each query of the local attention sees."""
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.models.attention import causal_mask
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    init_model_parallel(ParallelConfig())
    mask = causal_mask(length, ParallelGroups.current().cp, window=window)
    return [row.nonzero()[:, 0].tolist() for row in mask]

"""Every field of ModelConfig is known wherever a model is described: none can be forgotten.

A new field fails ``test_every_field_is_here`` until it has a row here, and then each of the places
that does not know it.
"""

import math
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_minitron.checkpoint.foreign.megatron_fields import match_family, model_fields
from nemo_minitron.checkpoint.foreign.megatron_stated import of_args
from nemo_minitron.checkpoint.megatron_args import megatron_lm_args
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import FAMILIES, read_config, written_config
from nemo_minitron.models import build
from tests.helpers.tiny import (
    DEEPSEEK_V3,
    GEMMA2,
    GEMMA3,
    GLM4_MOE,
    GPT2,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MIXTRAL,
    NEMOTRON,
    NEMOTRON_H,
    OLMO2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_NEXT,
    SMOLLM3,
)
from tests.unit.test_families import LLAMA3_ROPE
from tests.unit.test_family_configs import QWEN2

GROUPED = replace(NEMOTRON_H, num_moe_experts=8, moe_router_num_groups=2, moe_router_group_topk=1)
MIXED = replace(QWEN2_MOE, ffn_hidden_size=64, moe_layer_freq=[0, 1, 1, 1])
# Field -> a model in which it says something, and what else it could say there.
FIELDS: dict[str, tuple[ModelConfig, Any]] = {
    "num_layers": (LLAMA, 3),
    "hidden_size": (LLAMA, 32),
    "ffn_hidden_size": (LLAMA, 48),
    "num_attention_heads": (LLAMA, 4),
    "num_query_groups": (LLAMA, 2),
    "kv_channels": (LLAMA, 16),
    "vocab_size": (LLAMA, 90),
    "max_position_embeddings": (GPT2, 256),
    "normalization": (GPT2, "RMSNorm"),
    "layernorm_epsilon": (replace(LLAMA, layernorm_epsilon=1e-6), 1e-5),
    "layernorm_zero_centered_gamma": (NEMOTRON, False),
    "gated_linear_unit": (LLAMA, False),
    "activation": (NEMOTRON, "gelu"),
    "activation_func_clamp_value": (GPT_OSS, None),
    "glu_linear_offset": (GPT_OSS, 0.0),
    "add_bias_linear": (GPT2, False),
    "add_qkv_bias": (QWEN2, False),
    "qk_layernorm": (QWEN3, False),
    "position_embedding_type": (GPT2, "rope"),
    "rotary_base": (replace(LLAMA, rotary_base=5e5), 1e4),
    "rotary_percent": (NEMOTRON, 1.0),
    "no_rope_freq": (SMOLLM3, [1, 0, 0, 1]),
    "multipliers": (GRANITE, {**(GRANITE.multipliers or {}), "logits": 4.0}),
    "apply_embedding_scaling": (GEMMA2, False),
    "attn_logit_softcapping": (GEMMA2, None),
    "final_logit_softcapping": (GEMMA2, 4.0),
    "rotary_base_local": (GEMMA3, 5e4),
    "window_size": (replace(QWEN3, window_size=[6, 0, 6, 0]), [0, 0, 6, 6]),
    "rope_scaling": (replace(LLAMA, rope_scaling=LLAMA3_ROPE), {**LLAMA3_ROPE, "factor": 32.0}),
    "share_embeddings_and_output_weights": (GPT2, False),
    "num_moe_experts": (MIXTRAL, 5),
    "moe_ffn_hidden_size": (MIXTRAL, 44),
    "moe_router_topk": (replace(MIXTRAL, moe_router_topk=3), 2),
    "moe_router_pre_softmax": (QWEN2_MOE, False),
    "moe_shared_expert_intermediate_size": (QWEN2_MOE, 60),
    "moe_shared_expert_gate": (QWEN2_MOE, False),
    "moe_layer_freq": (MIXED, [1, 1, 0, 1]),
    "moe_router_score_function": (NEMOTRON_H, "softmax"),
    "moe_router_enable_expert_bias": (NEMOTRON_H, False),
    "moe_router_topk_scaling_factor": (NEMOTRON_H, 1.0),
    "moe_router_num_groups": (GROUPED, 4),
    "moe_router_group_topk": (replace(GROUPED, moe_router_num_groups=4), 2),
    "linear_attention_freq": (QWEN3_NEXT, [1, 1, 1, 0]),
    "linear_num_key_heads": (QWEN3_NEXT, 4),
    "linear_num_value_heads": (QWEN3_NEXT, 6),
    "linear_key_head_dim": (QWEN3_NEXT, 8),
    "linear_value_head_dim": (QWEN3_NEXT, 8),
    "linear_conv_kernel_dim": (QWEN3_NEXT, 4),
    "attention_output_gate": (QWEN3_NEXT, False),
    "kv_lora_rank": (DEEPSEEK_V3, 16),
    "q_lora_rank": (DEEPSEEK_V3, None),
    "qk_head_dim": (DEEPSEEK_V3, 8),
    "qk_pos_emb_head_dim": (DEEPSEEK_V3, 8),
    "hybrid_layer_pattern": (NEMOTRON_H, "M-M*MEMM"),
    "mamba_num_heads": (NEMOTRON_H, 4),
    "mamba_head_dim": (NEMOTRON_H, 4),
    "mamba_num_groups": (NEMOTRON_H, 4),
    "mamba_state_dim": (NEMOTRON_H, 8),
    "mtp_num_layers": (replace(GLM4_MOE, mtp_num_layers=1), None),
}
# Fields that do not describe the network, and what they are.
OTHERS = {
    "family": "name of the table that all of these are read with",
    "dtype": "of the weights; readers take it from the weights themselves",
    "kept_layers": "where the layers come from",
    "hf": "the source's own config.json (tests/unit/test_written_config.py)",
}


def test_every_field_is_here() -> None:
    assert {*FIELDS, *OTHERS} == {field.name for field in fields(ModelConfig)}
    for name, (model, other) in FIELDS.items():
        assert getattr(model, name) != other


@pytest.mark.parametrize("name", FIELDS)
def test_config_json_says_it(name: str) -> None:
    model, _ = FIELDS[name]
    assert getattr(read_config(written_config(model))[1], name) == getattr(model, name)


@pytest.mark.parametrize("name", FIELDS)
def test_arguments_of_megatron_lm_say_it_and_are_read(name: str) -> None:
    """What is stored beside the weights, through the reader of foreign checkpoints."""
    model, other = FIELDS[name]
    assert vars(megatron_lm_args(model)) != vars(megatron_lm_args(replace(model, **{name: other})))
    stated = of_args(vars(megatron_lm_args(model)), "here")
    _, again = match_family(stated, model_fields(stated, model.vocab_size))
    assert getattr(again, name) == getattr(model, name)


ALONE = SimpleNamespace(pp=SimpleNamespace(rank=lambda: 0), is_first_stage=True, is_last_stage=True)


def megatron(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Everything that Megatron's model class is given."""
    parallel = ParallelConfig()
    mcore = build.transformer_config(model, parallel, torch.float32)
    given: dict[str, Any] = {}

    class Recorder(torch.nn.Module):
        rotary_pos_emb = SimpleNamespace(inv_freq=torch.zeros(1))

        def __init__(self, **values: Any) -> None:
            super().__init__()
            given.update(values)

    monkeypatch.setattr(build, "HiddenGPTModel", Recorder)
    monkeypatch.setattr(build, "layer_spec", lambda _: lambda *_: None)
    monkeypatch.setattr(build, "prediction_spec", lambda *_: None)
    longest = model.max_seq_length or 0
    build._build_chunk(model, mcore, ALONE, None, longest)  # type: ignore[arg-type]  # no groups are needed on one rank
    if model.hybrid_layer_pattern is not None and build.HAVE_HYBRID:
        from nemo_minitron.models.hybrid_spec import staged_pattern

        given["hybrid_layer_pattern"] = staged_pattern(model, parallel)
    plain = {key: value for key, value in vars(given.pop("config")).items() if not callable(value)}
    return {**plain, **given, "activation": mcore.activation_func}


@pytest.mark.parametrize("name", FIELDS)
def test_megatron_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = FIELDS[name]
    if name == "hybrid_layer_pattern" and not build.HAVE_HYBRID:
        with pytest.raises(ValueError, match=r"hybrid models .* need megatron-core 0.18 or later"):
            build.hybrid_builder(ParallelConfig())
        return
    if model.linear_attention_freq is not None and not build.HAVE_DELTA_NET:
        with pytest.raises(ValueError, match=r"need megatron-core 0\.19 or later"):
            megatron(model, monkeypatch)
        return
    one, another = (megatron(m, monkeypatch) for m in (model, replace(model, **{name: other})))
    assert one != another


@pytest.mark.parametrize("name", FIELDS)
def test_smaller_configs_keep_it(name: str) -> None:
    """Whole, or its entries for the layers that stay."""
    model, _ = FIELDS[name]
    small = model.resized({}, [0, 2])
    assert (small.num_layers, small.kept_layers) == (2, [0, 2])
    value, kept = getattr(model, name), getattr(small, name)
    if isinstance(value, list):
        assert kept == [value[0], value[2]]
    elif name == "hybrid_layer_pattern":
        assert kept == value[0] + value[2]
    elif name != "num_layers":
        assert kept == value


def test_alike_layers_are_not_in_model_yaml(tmp_path: Path) -> None:
    """The file stays as versions without per-layer fields write it, and theirs is read."""
    LLAMA.save(tmp_path)
    text = (tmp_path / "model.yaml").read_text()
    optional = ("no_rope_freq", "window_size", "multipliers", "moe_layer_freq")
    assert not any(name in text for name in optional)
    assert ModelConfig.load(tmp_path) == LLAMA
    SMOLLM3.save(tmp_path)
    assert ModelConfig.load(tmp_path) == SMOLLM3
    assert replace(SMOLLM3, no_rope_freq=[0] * 4).no_rope_freq is None
    assert replace(MIXED, moe_layer_freq=[1] * 4).moe_layer_freq is None
    with pytest.raises(ValueError, match=r"moe_layer_freq=\[1, 0, 1, 1\] needs experts"):
        replace(LLAMA, moe_layer_freq=[1, 0, 1, 1])


def test_a_per_layer_field_has_an_entry_for_each_layer() -> None:
    with pytest.raises(ValueError, match="no_rope_freq has 3 entries, but num_layers=4"):
        replace(SMOLLM3, no_rope_freq=[0, 1, 0])
    hf = {**written_config(SMOLLM3), "no_rope_layers": [1, 0, 1]}
    with pytest.raises(ValueError, match="no_rope_layers is of 3 layers, but num_hidden_layers=4"):
        read_config(hf)


@pytest.mark.parametrize(("said", "read"), [(4, [0, 0, 0, 1]), (2, [0, 1, 0, 1]), (0, None)])
def test_every_nth_layer_of_megatron_is_a_list(said: int, read: list[int] | None) -> None:
    stated = of_args({**vars(megatron_lm_args(SMOLLM3)), "no_rope_freq": said}, "here")
    assert model_fields(stated, SMOLLM3.vocab_size)["no_rope_freq"] == read
    stated = of_args({**vars(megatron_lm_args(SMOLLM3)), "no_rope_freq": 3}, "here")
    with pytest.raises(ValueError, match=r"no_rope_freq=3 .* only a divisor of num_layers=4"):
        model_fields(stated, SMOLLM3.vocab_size)


def test_dense_layers_of_megatron_are_a_list() -> None:
    """A number is read as Megatron does; experts alone need no list, and a dense width none."""
    args = vars(megatron_lm_args(MIXED))

    def read(said: Any) -> dict[str, Any]:
        return model_fields(of_args({**args, "moe_layer_freq": said}, "here"), MIXED.vocab_size)

    assert read(2)["moe_layer_freq"] == [1, 0, 1, 0]
    assert read(2)["ffn_hidden_size"] == MIXED.ffn_hidden_size
    for alike in (1, [1] * 4):
        assert read(alike)["moe_layer_freq"] is None
        assert read(alike)["ffn_hidden_size"] == MIXED.moe_ffn_hidden_size
    for wrong in (0, [1, 0], [0] * 4):
        with pytest.raises(ValueError, match=r"moe_layer_freq=.* only a list of num_layers=4"):
            read(wrong)


@pytest.mark.parametrize("model", [OLMO2, LLAMA, GLM4_MOE, GPT_OSS], ids=lambda m: m.family)
def test_modules_of_a_family_are_named_and_read(model: ModelConfig) -> None:
    """All else that the arguments say of the first two is the same."""
    stated = of_args(vars(megatron_lm_args(model)), "here")
    assert match_family(stated, model_fields(stated, model.vocab_size))[1] == model


def test_settings_of_a_family_reach_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """And cannot be overridden: a model that runs but is not the model is the worst outcome."""
    family = replace(FAMILIES["llama"], megatron={"attention_output_gate": True})
    monkeypatch.setitem(FAMILIES, "llama", family)
    given = LLAMA, ParallelConfig(), torch.float32
    assert build.transformer_config(*given).attention_output_gate
    says = "attention_output_gate=False is not supported for family 'llama', which needs .*=True"
    with pytest.raises(ValueError, match=says):
        build.transformer_config(*given, {"attention_output_gate": False})


def test_a_model_that_no_config_json_can_say():
    """Its family's reason is given once, not once for each field."""
    args = vars(megatron_lm_args(NEMOTRON_H))
    stated = of_args({**args, "layernorm_epsilon": 1e-6}, "here")
    with pytest.raises(ValueError, match=r"layer_norm_epsilon=1e-06 is not supported") as error:
        match_family(stated, model_fields(stated, NEMOTRON_H.vocab_size))
    says = "here: no supported family can express this model (nemotron_h: config.json "
    assert str(error.value).startswith(says)
    assert str(error.value).count("layer_norm_epsilon") == 1


@pytest.mark.parametrize(
    ("config", "name", "value", "says"),
    [
        (LLAMA, "layernorm_epsilon", math.nan, "=nan of the model must be a finite number"),
        (LLAMA, "layernorm_epsilon", -1e-5, "=-1e-05 must not be negative"),
        (LLAMA, "num_layers", 2.5, "=2.5 of the model must be a whole number"),
        (LLAMA, "num_layers", True, "=True of the model must be a whole number"),
        (LLAMA, "rotary_base", 0.0, "=0.0 of the model must be above 0"),
        (LLAMA, "num_attention_heads", 0, "=0 of the model must be above 0"),
        (LLAMA, "num_query_groups", 0, "=0 of the model must be above 0"),
        (LLAMA, "num_query_groups", -2, "=-2 of the model must be above 0"),
        (LLAMA, "max_position_embeddings", 0, "=0 of the model must be above 0"),
        (DEEPSEEK_V3, "q_lora_rank", 0, "=0 of the model must be above 0"),
        (LLAMA, "qk_layernorm", "false", "='false' of the model must be true or false"),
        (LLAMA, "rope_scaling", {"rope_type": "linear", "factor": math.inf}, "=.* finite numbers"),
        (GRANITE, "multipliers", {"logits": math.nan}, "=.* must be finite numbers"),
        (GEMMA2, "final_logit_softcapping", 0.0, "=0.0 of the model must be above 0"),
        (GLM4_MOE, "moe_router_topk_scaling_factor", math.nan, "=nan .* a finite number"),
    ],
)
def test_numbers_that_no_model_has(config, name, value, says):
    """JSON files may hold NaN, and texts where numbers belong."""
    with pytest.raises(ValueError, match=f"^{name}{says}$"):
        replace(config, **{name: value})


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (NEMOTRON_H, "mamba_state_dim"),
        (QWEN3_NEXT, "linear_key_head_dim"),
        (DEEPSEEK_V3, "qk_head_dim"),
    ],
)
def test_sizes_of_layers_are_above_0(config, name):
    with pytest.raises(ValueError, match=rf"needs sizes above 0, not .*'{name}': -8"):
        replace(config, **{name: -8})

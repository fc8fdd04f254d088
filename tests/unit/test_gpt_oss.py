"""gpt-oss: the published config.json, what is refused, and weights in MXFP4."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from nemo_minitron.checkpoint.foreign.megatron_fields import match_family, model_fields
from nemo_minitron.checkpoint.foreign.megatron_stated import of_args
from nemo_minitron.checkpoint.hf import to_hf, write_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.megatron_args import megatron_lm_args
from nemo_minitron.checkpoint.mxfp4 import numbers_of
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.config import schema
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.registry import family_of, read_config, written_config
from nemo_minitron.families.table import active_parameters, parameter_count
from tests.helpers.tiny import GPT_OSS, random_weights

MXFP4 = {"modules_to_not_convert": ["model.embed_tokens"], "quant_method": "mxfp4"}
PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}


def test_gpt_oss_20b_as_published() -> None:
    """Its config.json comes back, and the parameters are as many as its model card says."""
    family, config = read_config(PUBLISHED)
    shipped = yaml.safe_load((schema.conf_dir() / "model" / "gpt_oss_20b.yaml").read_text())
    assert replace(config, hf={}, dtype="bfloat16") == ModelConfig(**shipped)
    assert round(parameter_count(family, config)["total"] / 1e9, 2) == 20.91
    embedding = config.vocab_size * config.hidden_size
    assert round((active_parameters(family, config) - embedding) / 1e9, 2) == 3.61
    assert config.window_size == [128, 0] * 12
    assert written_config(config) == PUBLISHED
    smaller = written_config(config.resized({"moe_router_topk": 2}, [0, 2, 5]))
    changed = {key for key in PUBLISHED if smaller[key] != PUBLISHED[key]}
    by_topk = {"num_experts_per_tok", "experts_per_token"}
    assert changed == {"num_hidden_layers", "layer_types", *by_topk}
    assert smaller["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


def test_what_config_json_leaves_out_is_what_transformers_takes() -> None:
    left_out = (
        "rope_scaling layer_types sliding_window head_dim num_key_value_heads swiglu_limit "
        "num_experts_per_tok experts_per_token rope_theta attention_bias rms_norm_eps"
    )
    short = {key: value for key, value in PUBLISHED.items() if key not in left_out.split()}
    theirs = json.loads(transformers.GptOssConfig(**short).to_json_string())
    for key in short:
        theirs.setdefault(key, short[key])
    found, wanted, published = (read_config(hf)[1] for hf in (short, theirs, PUBLISHED))
    assert replace(found, hf={}) == replace(published, hf={})
    assert replace(wanted, hf={}, dtype=published.dtype) == replace(published, hf={})


def test_megatrons_own_arguments_are_read() -> None:
    """Megatron builds the same network without the modules that the argument spec names."""
    args = {**vars(megatron_lm_args(GPT_OSS)), "spec": None}
    stated = of_args(args, "here")
    assert match_family(stated, model_fields(stated, GPT_OSS.vocab_size))[1] == GPT_OSS
    stated = of_args({**args, "softmax_type": "off-by-one"}, "here")
    with pytest.raises(ValueError, match=r"softmax_type=off-by-one .* only vanilla or learnable"):
        model_fields(stated, GPT_OSS.vocab_size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": False}, "attention_bias=False is not supported; only True"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha=1.0 is not supported; only 1.702"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu is not supported"),
        ({"experts_per_token": 2}, "experts_per_token=2 is not supported; only 4"),
        ({"initial_context_length": 8192}, "initial_context_length=8192 .* only 4096"),
        (
            {"num_experts_per_tok": 1, "experts_per_token": 1},
            "num_experts_per_tok=1 is not supported: Megatron-Core's router needs at least 2",
        ),
        ({"sliding_window": None}, "sliding_window=None, which transformers does not run"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types holds .*chunked_attention"),
        ({"num_local_experts": 2}, "moe_router_topk=4 must be between 1 and num_moe_experts=2"),
        ({"mlp_bias": True}, "mlp_bias=true"),
    ],
)
def test_what_the_table_cannot_hold_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config({**PUBLISHED, **change})


def random_bytes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def test_numbers_are_those_of_transformers() -> None:
    """Every scale with every pair of numbers, bit by bit."""
    torch.manual_seed(0)
    blocks = random_bytes(2, 8, 16, 16)
    blocks[0, 0] = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scales = torch.arange(256, dtype=torch.uint8).view(2, 8, 16)
    want = convert_moe_packed_tensors(blocks, scales)
    got = numbers_of(blocks, scales)
    assert got.shape == want.shape == (2, 512, 8)
    assert torch.equal(got.view(torch.int16), want.view(torch.int16))


NAME = "model.layers.{}.mlp.experts.{}_proj"


def packed(folder: Path) -> dict[str, torch.Tensor]:
    """A random gpt-oss as it is published: experts in MXFP4, all else in bfloat16."""
    torch.manual_seed(0)
    family, config = family_of(GPT_OSS), GPT_OSS.resized({"moe_ffn_hidden_size": 32})
    store = {name: from_tensor(t.bfloat16()) for name, t in random_weights(config).items()}
    written = {**family.to_hf(config), "quantization_config": MXFP4}
    folder.mkdir()
    write_hf(folder, to_hf(family, config, store), written, "5GB")
    tensors = load_file(folder / "model.safetensors")
    for layer in range(config.num_layers):
        for name in (NAME.format(layer, which) for which in ("gate_up", "down")):
            experts, columns, rows = tensors.pop(name).shape
            tensors[f"{name}_blocks"] = random_bytes(experts, rows, columns // 32, 16)
            tensors[f"{name}_scales"] = random_bytes(experts, rows, columns // 32) // 8 + 110
    save_file(tensors, folder / "model.safetensors")
    return tensors


def test_mxfp4_weights_are_dequantised_as_transformers_does(tmp_path: Path) -> None:
    tensors = packed(tmp_path / "hf")
    opened = open_source(str(tmp_path / "hf"), None)
    assert opened.config.dtype == "bfloat16"
    assert "quantization_config" not in written_config(opened.config)
    out = to_hf(opened.family, opened.config, opened.store)
    for layer in range(GPT_OSS.num_layers):
        for which in ("gate_up", "down"):
            name = NAME.format(layer, which)
            parts = (tensors[f"{name}_{part}"] for part in ("blocks", "scales"))
            assert torch.equal(out[name].read(), convert_moe_packed_tensors(*parts))
    plain = {name: tensor for name, tensor in tensors.items() if name in out}
    assert len(out) == len(plain) + 2 * GPT_OSS.num_layers
    assert all(torch.equal(out[name].read(), tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "gate_up_proj_scales is missing; download"),
        ({"blocks": None}, "gate_up_proj_blocks is missing; download"),
        ({"scales": random_bytes(4, 64, 1)}, "MXFP4 needs 16 bytes for every scale"),
        ({"blocks": random_bytes(4, 64, 2, 8)}, "MXFP4 needs 16 bytes for every scale"),
    ],
)
def test_damaged_mxfp4_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors = packed(tmp_path / "hf")
    for part, tensor in change.items():
        name = f"{NAME.format(1, 'gate_up')}_{part}"
        del tensors[name]
        tensors |= {} if tensor is None else {name: tensor}
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "hf"), None)


def test_bytes_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    tensors = packed(tmp_path / "hf")
    tensors["model.norm.weight"] = random_bytes(64)
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight is torch.uint8, no dtype of weights"):
        open_source(str(tmp_path / "hf"), None)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    tensors = packed(tmp_path / "hf")
    name = f"{NAME.format(0, 'down')}_bias"
    tensors[name] = tensors[name][:3].clone()
    save_file(tensors, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"down_proj_bias\[3\]"):
        open_source(str(tmp_path / "hf"), None)

"""DeepSeek-V2 and V3: config.json, what is refused, FP8 weights, layers for further tokens."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoint.foreign.megatron_fields import match_family, model_fields
from nemo_minitron.checkpoint.foreign.megatron_stated import of_args
from nemo_minitron.checkpoint.hf import to_hf, write_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.megatron_args import megatron_lm_args
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.registry import FAMILIES, family_of, read_config, written_config
from nemo_minitron.families.table import parameter_count
from nemo_minitron.pruning.targets import check_result
from tests.helpers.tiny import DEEPSEEK_EXPERTS, DEEPSEEK_V2, DEEPSEEK_V3, random_weights

V3, V2 = replace(DEEPSEEK_EXPERTS, layernorm_epsilon=1e-6), DEEPSEEK_V2
SOFTMAX = replace(
    DEEPSEEK_V2,
    moe_layer_freq=[0, 1, 1, 1],
    num_moe_experts=4,
    moe_ffn_hidden_size=24,
    moe_shared_expert_intermediate_size=24,
    moe_router_pre_softmax=True,
    moe_router_topk_scaling_factor=1.5,
)
GREEDY = {"topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1}


PUBLISHED: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 100000,
    "eos_token_id": 100001,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v2",
    "moe_intermediate_size": 1408,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 102400,
}


def test_deepseek_v2_lite_as_published() -> None:
    """Its config.json comes back, and the parameters are as many as its files hold."""
    family, config = read_config(PUBLISHED)
    assert parameter_count(family, config)["total"] == 15_706_484_224
    assert written_config(config) == PUBLISHED
    smaller = written_config(config.resized({"num_moe_experts": 32}, list(range(20))))
    changed = {key for key in PUBLISHED if smaller[key] != PUBLISHED[key]}
    assert changed == {"n_routed_experts", "num_hidden_layers"}


def test_key_heads_that_a_deepseek_v3_does_not_count() -> None:
    """They are 128 there, and as many as the others in a DeepSeek-V2."""
    hf = {**FAMILIES["deepseek_v3"].to_hf(V3), "num_attention_heads": 128, "hidden_size": 128}
    del hf["num_key_value_heads"]
    _, config = read_config(hf)
    assert "num_key_value_heads" not in written_config(config)
    smaller = config.resized({"num_attention_heads": 64, "num_query_groups": 64})
    written = json.loads(json.dumps(written_config(smaller)))
    theirs = transformers.DeepseekV3Config.from_dict(written)
    assert (theirs.num_attention_heads, theirs.num_key_value_heads) == (64, 64)
    with pytest.raises(ValueError, match=r"num_key_value_heads=128 .*only num_attention_heads=64"):
        read_config({**hf, "num_attention_heads": 64})


@pytest.mark.parametrize("config", [V3, DEEPSEEK_V3, V2, SOFTMAX])
def test_config_survives(config: ModelConfig) -> None:
    """As it is written, as transformers reads it, and in Megatron-LM's arguments."""
    family = family_of(config)
    written = json.loads(json.dumps(family.to_hf(config)))
    assert replace(family.from_hf(written), hf={}) == config
    name = written["architectures"][0].replace("ForCausalLM", "Config")
    theirs = getattr(transformers, name)(**written)
    again = family.from_hf(theirs.to_dict())
    assert replace(again, hf={}, dtype="float32") == config
    stated = of_args(vars(megatron_lm_args(config)), "here")
    found, read = match_family(stated, model_fields(stated, config.vocab_size))
    scaling, wanted = read.rope_scaling or {}, config.rope_scaling or {}
    assert scaling == pytest.approx(wanted)
    assert config.num_moe_experts is None or found is family
    assert replace(read, rope_scaling=config.rope_scaling, family=config.family) == config


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (V3, {"rope_interleave": False}, "rope_interleave=false is not supported"),
        (V3, {"attention_bias": True}, "attention_bias=true is not supported"),
        (V3, {"num_key_value_heads": 4}, "num_key_value_heads=4 .*only num_attention_heads=8"),
        (V3, {"head_dim": 12}, "head_dim=12 is not supported; only 6"),
        (V3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "only null and yarn"),
        (V3, {"topk_method": "greedy"}, "topk_method=greedy is not supported.*only noaux_tc"),
        (V3, {"norm_topk_prob": False}, "norm_topk_prob=false is not supported"),
        (V3, {"num_experts_per_tok": 1}, "num_experts_per_tok=1 .* at least 2"),
        (V3, {"n_shared_experts": 0}, "n_shared_experts=0 is not supported"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq=2 is not supported.*only 1"),
        (
            V3,
            {"num_experts_per_tok": 3},
            "n_group=2 .* transformers by two",
        ),
        (V3, {"num_nextn_predict_layers": 2}, r"source_ignore=\[num_nextn_predict_layers\]"),
        (SOFTMAX, GREEDY, "n_group=2 .* Megatron-Core ranks groups .*, 2, transformers by 1"),
        (SOFTMAX, {"norm_topk_prob": True}, "norm_topk_prob=True is not supported"),
    ],
)
def test_what_the_table_cannot_hold_is_refused(
    config: ModelConfig, change: dict[str, Any], message: str
) -> None:
    family = family_of(config)
    with pytest.raises(ValueError, match=message):
        family.from_hf({**family.to_hf(config), **change})


@pytest.mark.parametrize(
    ("config", "target", "message"),
    [
        (V3, {"num_attention_heads": 4}, "must be a multiple of num_query_groups=8"),
        (V3, {"moe_ffn_hidden_size": 20}, "intermediate_size=48 must be a multiple of .*=20"),
        (V3, {"num_moe_experts": 5}, "num_moe_experts=5 must be a multiple of .*groups=2"),
        (V3, {"num_moe_experts": 2}, "leaves 1 experts in each .*=2, .* keep at least 4"),
        (V2, {"hidden_size": 60}, "hidden_size=60 must be a multiple of num_attention_heads=8"),
    ],
)
def test_targets_refused(config: ModelConfig, target: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_result(config, PruningConfig(target=TargetConfig(**target)))


def test_heads_are_not_merged() -> None:
    heads = {"num_attention_heads": 4, "num_query_groups": 4}
    pruning = PruningConfig(target=TargetConfig(**heads), merge_heads=True)
    with pytest.raises(ValueError, match="merge_heads=true is not supported with multi-latent"):
        check_result(V3, pruning)


def test_sizes_belong_together() -> None:
    with pytest.raises(ValueError, match="num_query_groups=4 must equal num_attention_heads=8"):
        replace(V3, num_query_groups=4)
    with pytest.raises(ValueError, match="multi-latent attention needs sizes above 0"):
        replace(V3, kv_lora_rank=None)


def saved(folder: Path, **change: Any) -> Path:
    """A random DeepSeek-V3 as a Hugging Face folder."""
    family, config = family_of(V3), V3
    store = {name: from_tensor(tensor) for name, tensor in random_weights(config).items()}
    written = {**family.to_hf(config), **change}
    folder.mkdir()
    write_hf(folder, to_hf(family, config, store), written, "5GB")
    return folder


def test_layers_for_further_tokens_are_passed_over(tmp_path: Path) -> None:
    folder = saved(tmp_path / "hf", num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    extra = {"model.layers.4.eh_proj.weight": torch.ones(2, 2)}
    save_file({**tensors, **extra}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"source_ignore=\[num_nextn_predict_layers\]"):
        open_source(str(folder), None)
    opened = open_source(str(folder), None, None, ["num_nextn_predict_layers"])
    assert opened.config.num_layers == 4


def test_fp8_weights_are_dequantised(tmp_path: Path) -> None:
    """With a scale for each block of 16 x 32, of which the last ones are not whole."""
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 32]}
    folder = saved(tmp_path / "hf", quantization_config=said)
    name = "model.layers.0.self_attn.q_b_proj.weight"
    tensors = {k: t.bfloat16() for k, t in load_file(folder / "model.safetensors").items()}
    rows, columns = tensors[name].shape
    scales = torch.rand(-(-rows // 16), -(-columns // 32)) + 0.5
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file({**tensors, f"{name}_scale_inv": scales}, folder / "model.safetensors")
    store = open_source(str(folder), None).store
    lazy = store["decoder.layers.0.self_attention.linear_q_up_proj.weight"]
    want = torch.empty(rows, columns)
    for row in range(rows):
        for column in range(columns):
            scale = scales[row // 16, column // 32]
            want[row, column] = tensors[name][row, column].float() * scale
    assert torch.equal(lazy.read(), want.bfloat16())
    assert lazy.read_rows is not None
    for start, stop in ((0, 3), (5, 18), (16, 32), (31, rows)):
        assert torch.equal(lazy.read_rows(start, stop), want[start:stop].bfloat16())
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"q_b_proj.weight is FP8 without scales"):
        open_source(str(folder), None)
    save_file({**tensors, f"{name}_scale_inv": scales[1:]}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"_scale_inv has shape .* weight_block_size=\[16, 32\]"):
        open_source(str(folder), None)
    norm = name.replace("self_attn.q_b_proj", "input_layernorm")
    held = {**tensors, name: tensors[name].bfloat16(), norm: tensors[norm].to(torch.float8_e4m3fn)}
    save_file({**held, f"{norm}_scale_inv": scales}, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"is FP8 of shape \(\d+,\), and weight_block_size=\[16, 32"
    ):
        open_source(str(folder), None)

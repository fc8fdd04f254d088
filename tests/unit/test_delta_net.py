"""Families with gated delta nets: config.json, and what is refused where."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

from nemo_minitron.checkpoint.hf import to_hf, write_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.config import schema
from nemo_minitron.config.distillation import IntermediateConfig
from nemo_minitron.config.layout import check_layout, check_writes
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.sft import check_packing
from nemo_minitron.distillation.layer_map import make_pairs
from nemo_minitron.families.registry import family_of, read_config, written_config
from nemo_minitron.families.table import active_parameters, parameter_count
from nemo_minitron.models import build
from nemo_minitron.pruning.scores import check_moments
from nemo_minitron.pruning.targets import check_pruning
from tests.helpers.tiny import LLAMA, QWEN3_NEXT, random_weights

MOE_OR_ROPE = re.compile("expert|rope_|router|moe|mlp|topk|rotary|sparse|sliding")
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_qwen3_next_as_it_was_published() -> None:
    """80B parameters, 3B of them active; config.json comes out as it came in."""
    family, config = read_config(PUBLISHED)
    assert config.linear_attention_freq == [1, 1, 1, 0] * 12
    count = parameter_count(family, config)
    assert [round(size / 1e9) for size in count.values()] == [80, 79]
    embedding = config.vocab_size * config.hidden_size
    assert round((active_parameters(family, config) - embedding) / 1e9, 2) == 3.56
    shipped = yaml.safe_load((schema.conf_dir() / "model" / "qwen3_next_80b.yaml").read_text())
    assert replace(config, hf={}) == ModelConfig(**shipped)
    assert written_config(config) == PUBLISHED
    kept = [0, 3, 4, 5, 7]
    small = written_config(config.resized({"hidden_size": 1024}, kept))
    kinds = ["linear_attention", "full_attention"]
    assert small["layer_types"] == [kinds[layer % 4 == 3] for layer in kept]
    assert read_config(small)[1].linear_attention_freq == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("name", ["Qwen3Next", "Qwen3_5Text", "Qwen3_5MoeText"])
def test_what_config_json_leaves_out_is_what_transformers_takes(name: str) -> None:
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    short = {key: PUBLISHED[key] for key in sizes} | {"max_position_embeddings": 32768}
    theirs = getattr(transformers, f"{name}Config")(**short)
    short["model_type"] = theirs.model_type
    whole = json.loads(theirs.to_json_string(use_diff=False))
    mine = (read_config(hf)[1] for hf in (short, {**whole, "architectures": None}))
    assert replace(next(mine), hf={}) == replace(next(mine), hf={})


def test_qwen3_5_says_what_it_said() -> None:
    """Sections of positions of images stay in config.json and change nothing; gates do."""
    rope = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    rope |= {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    dense = {key: PUBLISHED[key] for key in PUBLISHED if not MOE_OR_ROPE.search(key)}
    hf = {
        **dense,
        "architectures": ["Qwen3_5ForCausalLM"],
        "model_type": "qwen3_5_text",
        "rope_parameters": rope,
        "attn_output_gate": True,
        "mtp_num_hidden_layers": 1,
        "mamba_ssm_dtype": "float32",
    }
    config = read_config(hf)[1]
    assert (config.rotary_base, config.rotary_percent) == (1e7, 0.25)
    assert written_config(config) == hf
    with pytest.raises(ValueError, match="attn_output_gate=False is not supported"):
        read_config({**hf, "attn_output_gate": False})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layer_types": ["full_attention"] * 48}, "at least one layer of each"),
        ({"layer_types": ["linear_attention"] * 47 + ["sliding_attention"]}, "only one of"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "num_hidden_layers=48"),
        ({"linear_num_key_heads": 5}, "linear_num_value_heads=32 must be a multiple of"),
        ({"linear_conv_kernel_dim": 0}, "needs sizes above 0"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true"),
    ],
)
def test_what_config_json_cannot_say(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        read_config({**PUBLISHED, **change})


REFUSED: dict[str, Any] = {
    "heads that ranks cannot share": (
        lambda: check_layout(QWEN3_NEXT, ParallelConfig(tensor_model_parallel_size=4,
                                                        sequence_parallel=True)),
        "must divide linear_num_key_heads=2",
    ),
    "heads that ranks of both kinds cannot share": (
        lambda: check_layout(
            QWEN3_NEXT,
            ParallelConfig(
                tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2
            ),
        ),
        "tensor_model_parallel_size=2 times parallel.context_parallel_size=2 must divide",
    ),
    "writing": (lambda: check_writes(QWEN3_NEXT, "generate writes"), "keeps no state from one"),
    "moments": (
        lambda: check_moments(QWEN3_NEXT, ["hidden"]),
        r"scores.moments=\['hidden'\] is not supported for models with linear attention",
    ),
    "losses of attention": (
        lambda: make_pairs(
            IntermediateConfig(losses=["attention_relation"], layer_map=[[1, 0]]), LLAMA, QWEN3_NEXT
        ),
        r"student layer 0 is of kind 'G-' in linear_attention_freq=",
    ),
    "a kind of layer that is gone": (
        lambda: check_pruning(QWEN3_NEXT, PruningConfig(drop_layers=[2])),
        r"kind '\*E' of linear_attention_freq=.* and moe_layer_freq=",
    ),
    "fewer layers than kinds": (
        lambda: check_pruning(QWEN3_NEXT, PruningConfig(target=TargetConfig(num_layers=2))),
        "the layers are of 3 kinds",
    ),
    "heads that are added up": (
        lambda: check_pruning(
            QWEN3_NEXT,
            PruningConfig(target=TargetConfig(num_attention_heads=4), merge_heads=True),
        ),
        "merge_heads=true is not supported with attention_output_gate",
    ),
    "heads of a gated delta net": (
        lambda: TargetConfig(linear_num_key_heads=1),
        "linear_num_key_heads is not a size that can be pruned: heads of a gated delta net share",
    ),
    "a hybrid": (
        lambda: replace(QWEN3_NEXT, hybrid_layer_pattern="*-E*"),
        "is for GPT models without",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str) -> None:
    what, says = REFUSED[name]
    with pytest.raises(ValueError, match=says):
        what()


def test_packed_records_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    data = DataConfig(path=str(tmp_path / "a.jsonl"), records="sft", pack=True)
    with pytest.raises(ValueError, match="the state of a gated delta net would go on"):
        check_packing(data, QWEN3_NEXT)


def test_an_older_megatron_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "HAVE_DELTA_NET", False)
    with pytest.raises(ValueError, match=r"'qwen3_next'.* need megatron-core 0.19 or later"):
        build.transformer_config(QWEN3_NEXT, ParallelConfig(), torch.float32)


def test_layers_for_further_tokens_are_left_out_on_request(tmp_path: Path) -> None:
    family = family_of(QWEN3_NEXT)
    store = {name: from_tensor(t) for name, t in random_weights(QWEN3_NEXT).items()}
    write_hf(tmp_path, to_hf(family, QWEN3_NEXT, store), family.to_hf(QWEN3_NEXT), "5GB")
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), "mtp.norm.weight": torch.ones(3)}, file)
    with pytest.raises(ValueError, match=r"mtp.norm.*set source_ignore=\[num_nextn_predict_lay"):
        open_source(str(tmp_path))
    opened = open_source(str(tmp_path), source_ignore=["num_nextn_predict_layers"])
    assert opened.store.keys() == store.keys()
    assert all(torch.equal(opened.store[n].read(), lazy.read()) for n, lazy in store.items())

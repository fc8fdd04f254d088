"""Every family's config.json: there and back, as transformers reads it, and what is refused."""

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError
from safetensors.torch import load_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from nemo_minitron.checkpoint.hf import model_config, open_hf, to_hf, to_megatron, write_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.checks import check_data
from nemo_minitron.families.fuse import HF_FORMS
from nemo_minitron.families.registry import FAMILIES, UNSUPPORTED, family_of, family_of_hf
from nemo_minitron.families.windows import layer_types
from nemo_minitron.models.build import embedding_factor, transformer_config
from nemo_minitron.models.spec import RMSNorm1P
from nemo_minitron.pruning.plan import make_plan
from nemo_minitron.pruning.slicing import prune_store
from nemo_minitron.pruning.targets import check_pruning, check_result
from tests.helpers.tiny import (
    GEMMA2,
    GEMMA3,
    GPT2,
    GPT_OSS,
    GRANITE,
    LLAMA,
    MINISTRAL,
    MINISTRAL3,
    MIXTRAL,
    NEMOTRON,
    OLMO2,
    PHI3_LONG,
    QWEN3,
    SMOLLM3,
    random_weights,
)

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
QWEN2 = replace(LLAMA, family="qwen2", add_qkv_bias=True)
PHI3 = replace(LLAMA, family="phi3", rotary_percent=0.5)
QWEN3_MOE = replace(MIXTRAL, family="qwen3_moe", qk_layernorm=True, moe_router_pre_softmax=True)
LONGROPE = PHI3_LONG.rope_scaling or {}
CONFIGS = [
    *(QWEN2, QWEN3, QWEN3_MOE, NEMOTRON, PHI3, PHI3_LONG, GPT2, SMOLLM3, OLMO2, GRANITE, GEMMA2),
    *(GEMMA3, MINISTRAL, MINISTRAL3),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_config_survives(config: ModelConfig) -> None:
    family = family_of(config)
    written = json.loads(json.dumps(family.to_hf(config)))
    assert family_of_hf(written) is family
    assert replace(family.from_hf(written), hf={}) == config
    # and transformers reads the same, adding fields of its own
    theirs = transformers.AutoConfig.for_model(**written)
    again = family.from_hf(theirs.to_dict())
    assert replace(again, hf={}, dtype="float32") == config
    # what was carried over says nothing about the sizes
    sizes = {"num_layers": 1, "ffn_hidden_size": 40}
    smaller = family.to_hf(again.resized(sizes))
    assert replace(family.from_hf(smaller), hf={}, dtype="float32") == config.resized(sizes)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_keys_and_values_of_a_qwen_that_does_not_count_them(model_type: str) -> None:
    """It has 32 of them, and as many as queries where config.json says null."""
    sizes = {"hidden_size": 128, "num_attention_heads": 64, "head_dim": 2, "vocab_size": 64}
    for more in ({}, {"num_key_value_heads": None}):
        theirs = transformers.AutoConfig.for_model(model_type, **sizes, **more)
        hf = {**theirs.to_dict(), **more, "model_type": model_type, "architectures": None}
        hf = {key: value for key, value in hf.items() if key in more or "num_key" not in key}
        found = FAMILIES[model_type].from_hf(hf)
        assert found.num_query_groups == theirs.num_key_value_heads == (64 if more else 32)


MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}


def test_mistral_defaults_are_those_of_transformers() -> None:
    family, hf = family_of(LLAMA), {**family_of(LLAMA).to_hf(LLAMA), **MISTRAL}
    for key in ("num_key_value_heads", "max_position_embeddings"):
        theirs = transformers.MistralConfig(**{k: v for k, v in hf.items() if k != key})
        mine = {k: v for k, v in hf.items() if k != key} | {"sliding_window": None}
        assert getattr(theirs, key) == family.to_hf(family.from_hf(mine))[key]
    assert transformers.MistralConfig(**hf).sliding_window == 4096
    assert family.from_hf({**hf, "max_position_embeddings": 131072}).window_size == [4096] * 4


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (QWEN3, {"attention_bias": True}, "attention_bias=true is not supported"),
        (QWEN2, {"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_scaling type 'su'"),
        (QWEN3_MOE, {"decoder_sparse_step": 0}, "decoder_sparse_step=0 leave no layer"),
        (QWEN3_MOE, {"attention_bias": True}, "attention_bias=true is not supported"),
        (NEMOTRON, {"hidden_act": "silu"}, "hidden_act=silu is not supported; only relu2"),
        (NEMOTRON, {"mlp_bias": True}, "mlp_bias=true is not supported"),
        (PHI3, {"sliding_window": 0}, "sliding_window=0 is not supported"),
        (PHI3, {"rope_scaling": {"type": "longrope"}}, "type longrope lacks short_factor"),
        (
            PHI3_LONG,
            {"head_dim": 16},
            "rope_scaling.short_factor must be a list of 6 numbers above 0",
        ),
        (
            PHI3_LONG,
            {"rope_scaling": {**LONGROPE, "long_factor": [1.0, 2.0, 0.0]}},
            "rope_scaling.long_factor must be a list of 3 numbers above 0",
        ),
        (PHI3_LONG, {"rope_scaling": {**LONGROPE, "factor": 0}}, "factor=0 must be above 0"),
        (PHI3_LONG, {"rope_scaling": {**LONGROPE, "long_mscale": 1.2}}, r"holds \['long_mscale'\]"),
        (MINISTRAL3, {"rope_scaling": {"rope_type": "yarn"}}, "of type yarn lacks factor"),
        (
            MINISTRAL3,
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "llama_4_scaling_beta": 0.1}},
            "type linear with llama_4_scaling_beta=0.1 is not supported .*; only yarn",
        ),
        (
            MINISTRAL3,
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}},
            "type yarn with llama_4_scaling_beta=None is not supported",
        ),
        (MINISTRAL, {"layer_types": ["full_attention"]}, "layer_types is of 1 layers"),
        (MINISTRAL, {"attention_bias": True}, "attention_bias=true"),
        (
            LLAMA,
            {"rope_scaling": {**YARN, "llama_4_scaling_beta": 0.1}},
            r"holds \['llama_4_scaling_beta'\]",
        ),
        (
            PHI3,
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "'linear' .*Phi-3 has longrope alone",
        ),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation=gelu is not supported"),
        (GEMMA2, {"use_bidirectional_attention": True}, "use_bidirectional_attention=true"),
        (GEMMA2, {"sliding_window": None, "layer_types": None}, "sliding_window=None, which trans"),
        (GEMMA3, {"sliding_window": None, "layer_types": None}, "sliding_window=None, which trans"),
        (GPT_OSS, {"sliding_window": None, "layer_types": None}, "sliding_window=None, which tran"),
        (GEMMA2, {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar=-1 must be a number above"),
        (GEMMA3, {"query_pre_attn_scalar": "8"}, "query_pre_attn_scalar='8' must be a number"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 of a Gemma 3"),
        (GEMMA3, {"rope_scaling": YARN}, "'yarn' is not supported; only linear"),
        (GEMMA3, {"rope_scaling": {"type": "linear", "factor": 8.0}}, "only rope_type, which says"),
        (GEMMA3, {"rope_parameters": {"factor": 8.0}}, r"rope_parameters holds \['factor'\]"),
        (
            GEMMA3,
            {"rope_parameters": {"sliding_attention": {"rope_theta": 5e3}}},
            "gives rope_theta as 5000.0 and as 10000.0",
        ),
        (GPT2, {"activation_function": "relu"}, "activation_function=relu is not supported"),
        (
            GPT2,
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=true is not supported; only false",
        ),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=false is not supported"),
        (GPT2, {"n_head": 5}, "n_embd=64 must be a multiple of n_head=5"),
    ],
)
def test_what_a_table_cannot_hold_is_refused(config, change, message):
    family = family_of(config)
    with pytest.raises(ValueError, match=message):
        family.from_hf({**family.to_hf(config), **change})


def test_a_window_that_no_sequence_reaches_is_none() -> None:
    hf = {**FAMILIES["phi3"].to_hf(PHI3), "sliding_window": 128}
    assert replace(FAMILIES["phi3"].from_hf(hf), hf={}) == PHI3


def test_longrope_needs_sizes_that_transformers_takes() -> None:
    """Its class of Phi-3 counts frequencies by the hidden size and the heads."""
    target = TargetConfig(hidden_size=40)
    says = r"hidden_size=40 by num_attention_heads=8 must be kv_channels=8 .*hidden_size=64"
    with pytest.raises(ValueError, match=says):
        check_result(PHI3_LONG, PruningConfig(target=target))
    check_result(
        PHI3_LONG, PruningConfig(target=TargetConfig(hidden_size=32, num_attention_heads=4))
    )
    wrong = deepcopy({**FAMILIES["phi3"].to_hf(PHI3_LONG), "hidden_size": 40})
    with pytest.raises(StrictDataclassClassValidationError, match="short_factor field must have"):
        transformers.Phi3Config(**wrong)


@pytest.mark.parametrize("beside", [{}, {"original_max_position_embeddings": 16}])
@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 64}])
def test_phi3_stretches_from_the_length_that_transformers_takes(beside, inside) -> None:
    """It is 4096 where nothing stands beside the dictionary, whatever stands inside."""
    factors = {key: LONGROPE[key] for key in ("rope_type", "short_factor", "long_factor")}
    hf = {
        **FAMILIES["phi3"].to_hf(PHI3_LONG),
        "max_position_embeddings": 131072,
        "rope_scaling": {**factors, **inside},
    }
    del hf["original_max_position_embeddings"]
    hf |= beside
    theirs = transformers.Phi3Config.from_dict(deepcopy(hf))
    _, factor = ROPE_INIT_FUNCTIONS["longrope"](theirs, None)
    mine = FAMILIES["phi3"].from_hf(hf).rope_scaling or {}
    length = theirs.rope_parameters["original_max_position_embeddings"]
    assert mine["original_max_position_embeddings"] == length
    assert mine["attention_factor"] == pytest.approx(factor, abs=1e-12)


def test_the_first_files_of_phi3_call_longrope_su() -> None:
    said = {**FAMILIES["phi3"].to_hf(PHI3_LONG), "rope_scaling": {**LONGROPE, "rope_type": "su"}}
    assert FAMILIES["phi3"].from_hf(said).rope_scaling == LONGROPE


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_others_are_refused_with_a_way_out(name: str) -> None:
    says = r"(Gemma 2 and 3 have|text\.save_pretrained\(TEXT\)).*supported: \["
    with pytest.raises(ValueError, match=says):
        family_of_hf({"architectures": [name]})


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    # As they are published, in which images have positions in three directions.
    "attn_output_gate": True,
    "mtp_num_hidden_layers": 1,
    "mamba_ssm_dtype": "float32",
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [1, 0, 0],
        "mrope_interleaved": True,
    },
}
GRIDS = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": 32,
}
SEEING = {
    "Gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "Mistral3": {
        "text_config": {**TEXT, "model_type": "ministral3"},
        "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
    },
    "Qwen3_5": {"text_config": {**TEXT, **DELTA_NET}, "vision_config": GRIDS},
}


@pytest.mark.parametrize("name", SEEING)
def test_the_text_model_of_one_that_sees_is_what_the_message_says(
    name: str, tmp_path: Path
) -> None:
    """What transformers' class of the text model writes holds the same weights, and opens here."""
    seeing_class = getattr(transformers, f"{name}ForConditionalGeneration")
    seeing = seeing_class(getattr(transformers, f"{name}Config")(**SEEING[name]))
    seeing.save_pretrained(tmp_path / "both")
    with pytest.raises(ValueError, match="it reads images too"):
        family_of_hf(json.loads((tmp_path / "both" / "config.json").read_text()))
    both = seeing_class.from_pretrained(tmp_path / "both")
    alone = transformers.AutoModelForCausalLM.from_config(both.config.text_config).to(both.dtype)
    alone.model.load_state_dict(both.model.language_model.state_dict())
    alone.lm_head.load_state_dict(both.lm_head.state_dict())
    alone.save_pretrained(tmp_path / "text")
    hf = json.loads((tmp_path / "text" / "config.json").read_text())
    mine = family_of_hf(hf).from_hf(hf)
    assert (mine.hidden_size, mine.kv_channels) == (32, 8)
    assert mine.window_size == ([4096, 4096] if name == "Gemma3" else None)
    language = seeing.model.language_model.named_parameters()
    wanted = {f"model.{name}": weight for name, weight in language}
    if not mine.share_embeddings_and_output_weights:
        wanted["lm_head.weight"] = seeing.lm_head.weight
    written = load_file(tmp_path / "text" / "model.safetensors")
    assert wanted.keys() == written.keys()
    assert all(torch.equal(written[name], weight) for name, weight in wanted.items())


def test_gemmas_as_google_publishes_them() -> None:
    """Releases of transformers before 5 leave out much that has a default."""
    hf = {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
    }
    theirs, mine = transformers.AutoConfig.for_model(**hf), FAMILIES["gemma3"].from_hf(hf)
    assert mine.window_size == [1024 * (kind == "sliding_attention") for kind in theirs.layer_types]
    rotations = theirs.rope_parameters
    assert mine.rotary_base == rotations["full_attention"]["rope_theta"]
    assert mine.rotary_base_local == rotations["sliding_attention"]["rope_theta"]
    assert mine.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert (mine.num_attention_heads, mine.num_query_groups, mine.kv_channels) == (8, 4, 256)
    assert (mine.vocab_size, mine.max_position_embeddings) == (262208, 131072)
    hf = {**hf, "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"}
    del hf["rope_scaling"], hf["attn_logit_softcapping"]
    mine = FAMILIES["gemma2"].from_hf(hf)
    assert (mine.attn_logit_softcapping, mine.final_logit_softcapping) == (50.0, 30.0)
    assert mine.window_size == [1024, 0] * 17


@pytest.mark.parametrize("key", ["sliding_window_pattern", "_sliding_window_pattern"])
def test_layers_of_a_gemma3_that_does_not_list_them(key: str) -> None:
    """transformers reads one of the keys and writes the other."""
    hf = {**FAMILIES["gemma3"].to_hf(GEMMA3), "num_hidden_layers": 8, "layer_types": None, key: 3}
    theirs = transformers.Gemma3TextConfig.from_dict(deepcopy(hf)).layer_types
    assert layer_types(FAMILIES["gemma3"].from_hf(hf)) == theirs


def test_a_scaling_of_gemma3_lies_over_its_rotation() -> None:
    """The base that stands there alone stays."""
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 500000.0}
    hf = FAMILIES["gemma3"].to_hf(GEMMA3)
    for key in ("rope_theta", "rope_local_base_freq"):
        del hf[key]
    hf |= {
        "rope_parameters": {"full_attention": full, "sliding_attention": {"rope_theta": 3000.0}},
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    }
    theirs = transformers.Gemma3TextConfig.from_dict(deepcopy(hf)).rope_parameters
    mine = FAMILIES["gemma3"].from_hf(hf)
    assert mine.rope_scaling == {"rope_type": "linear", "factor": 8.0}
    assert mine.rotary_base == theirs["full_attention"]["rope_theta"] == 500000.0
    assert mine.rotary_base_local == theirs["sliding_attention"]["rope_theta"] == 3000.0
    with pytest.raises(ValueError, match=r"rope_scaling.factor=4.0 and rope_parameters.factor=8.0"):
        FAMILIES["gemma3"].from_hf({**hf, "rope_scaling": {"rope_type": "linear", "factor": 4.0}})


def test_gemma_needs_a_hidden_size_that_its_heads_divide() -> None:
    """Whole or after pruning; sizes between two rounds need not be such."""
    target = TargetConfig(hidden_size=60)
    says = r"hidden_size=60 must be a multiple of num_attention_heads=8 .*hidden_size=56"
    with pytest.raises(ValueError, match=says):
        check_result(GEMMA2, PruningConfig(target=target))
    check_result(GEMMA2, PruningConfig(target=TargetConfig(hidden_size=60, num_attention_heads=4)))
    check_pruning(GEMMA2, PruningConfig(target=target))
    with pytest.raises(StrictDataclassClassValidationError, match="not a multiple of the number"):
        transformers.Gemma2Config(hidden_size=60, num_attention_heads=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_and_embeddings_are_those_of_transformers(dtype: torch.dtype) -> None:
    """The factor of the embeddings and 1 + weight, each rounded where transformers rounds it."""
    from transformers.models.gemma3 import modeling_gemma3 as theirs

    torch.manual_seed(0)
    norm = theirs.Gemma3RMSNorm(48, eps=1e-6).to(dtype)
    torch.nn.init.normal_(norm.weight, std=0.1)
    mine = RMSNorm1P(48, eps=1e-6).to(dtype)
    mine.load_state_dict(norm.state_dict())
    x = torch.randn(5, 48).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0.0
    torch.testing.assert_close(mine(x), norm(x), rtol=tolerance, atol=tolerance)
    words = theirs.Gemma3TextScaledWordEmbedding(9, 3072, 0, embed_scale=3072**0.5).to(dtype)
    core = transformer_config(replace(GEMMA3, hidden_size=3072), ParallelConfig(), dtype)
    factor = embedding_factor(core)
    ids = torch.arange(9)
    assert torch.equal(words.weight[ids] * factor, words(ids))


# ---------------------------------------------------------------- GPT-2


@pytest.mark.parametrize("size", ["hidden_size", "num_attention_heads", "num_query_groups"])
def test_gpt2_refuses_sizes_its_config_cannot_express(size: str) -> None:
    half = getattr(GPT2, size) // 2
    pruning = PruningConfig(target=TargetConfig(**{size: half}))
    message = rf"pruning.target.{size}={half} is not supported for family 'gpt2': .*n_embd / n_head"
    with pytest.raises(ValueError, match=message) as error:
        check_pruning(GPT2, pruning)
    assert "set only pruning.target.num_layers and pruning.target.ffn_hidden_size" in str(
        error.value
    )


def test_gpt2_takes_the_others() -> None:
    target = TargetConfig(ffn_hidden_size=40, num_layers=2, hidden_size=GPT2.hidden_size)
    check_pruning(GPT2, PruningConfig(target=target))


def test_sequences_longer_than_learned_positions_are_refused() -> None:
    data = DataConfig(path="-", seq_length=129)
    with pytest.raises(
        ValueError, match=r"data.seq_length=129 is longer than 128, .*max_position_embeddings"
    ):
        check_data(data, max_seq_length=GPT2.max_seq_length)
    assert LLAMA.max_seq_length is None


def test_gpt2_as_it_was_published(tmp_path) -> None:
    """Without the prefix of the names, with the causal masks of every layer."""
    family, weights = family_of(GPT2), random_weights(GPT2)
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    old = {
        name.removeprefix("transformer."): tensor
        for name, tensor in to_hf(family, GPT2, store).items()
    }
    for layer in range(GPT2.num_layers):
        old[f"h.{layer}.attn.bias"] = from_tensor(torch.ones(1, 1, 8, 8, dtype=torch.uint8))
        old[f"h.{layer}.attn.masked_bias"] = from_tensor(torch.tensor(-1e4))
    write_hf(tmp_path, old, family.to_hf(GPT2), "5GB")
    hf_config, hf_store = open_hf(tmp_path)
    back = to_megatron(*model_config(hf_config, hf_store), hf_store)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name].read(), weights[name]) for name in weights)


# ---------------------------------------------------------------- forms, merging


@pytest.mark.parametrize("form", HF_FORMS)
def test_forms_are_exact_inverses(form: str) -> None:
    rows = (LLAMA.num_attention_heads + 2 * LLAMA.num_query_groups) * LLAMA.kv_channels
    tensor = torch.randn(rows, 5).half()
    written = HF_FORMS[form].to_hf(LLAMA, tensor)
    assert written.shape == ((5, rows) if HF_FORMS[form].transposed else (rows, 5))
    assert written.is_contiguous()
    back = HF_FORMS[form].to_megatron(LLAMA, written)
    assert torch.equal(back, tensor)
    assert back.is_contiguous()


def test_biases_are_merged_with_their_heads() -> None:
    """A bias is one more input of the matrix, whose value is always 1."""
    from nemo_minitron.pruning.scores import Scores, model_meta

    torch.manual_seed(0)
    layers, heads = QWEN2.num_layers, QWEN2.num_attention_heads
    scores = Scores(head=torch.rand(layers, heads), meta={"model": model_meta(QWEN2)})
    target = TargetConfig(num_attention_heads=heads // 2)
    plan = make_plan(QWEN2, PruningConfig(target=target, merge_heads=True), scores)
    weights = random_weights(QWEN2)
    name = "decoder.layers.1.self_attention.linear_qkv."
    column = weights[name + "weight"][:, :1]
    weights[name + "bias"] = column[:, 0].clone()
    store = {key: from_tensor(tensor) for key, tensor in weights.items()}
    pruned = prune_store(family_of(QWEN2), QWEN2, plan, store)
    bias, weight = (pruned[name + kind].read() for kind in ("bias", "weight"))
    assert torch.equal(bias, weight[:, 0])
    assert plan.merge[1]
    plain = replace(plan, merge=[])
    kept = prune_store(family_of(QWEN2), QWEN2, plain, store)[name + "bias"].read()
    assert not torch.equal(bias, kept)

import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGUFEndian, GGUFWriter
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize

from nemo_minitron.checkpoint.gguf import open_gguf
from nemo_minitron.checkpoint.hf import model_config, to_megatron
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.checkpoint.tokenizer import gguf_tokenizer
from tests.helpers import gguf_fixtures
from tests.helpers.gguf_fixtures import llama, write_gguf


def write_raw(path, data, kind):
    """A model whose first v_proj, 64 x 256, is given as the bytes of its blocks."""
    model = llama(hidden_size=256, num_key_value_heads=4, head_dim=16)
    raw = {"blk.0.attn_v.weight": (data, kind)}
    write_gguf(path, model, drop="layers.0.self_attn.v_proj", raw=raw)


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": True}, {"head_dim": 24}])
def test_plain_file_gives_back_every_tensor_and_size(tmp_path, overrides):
    model = llama(**overrides)
    write_gguf(tmp_path / "model.gguf", model)
    hf, store = open_gguf(tmp_path / "model.gguf")
    assert set(store) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(store[name].read(), parameter), name
    source = model.config.to_dict()
    for key in (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
    ):
        assert hf[key] == source[key], key
    assert hf["rope_theta"] == 5e4
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, 0, 2)


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
def test_quantised_files_are_dequantised_to_float32(tmp_path, kind):
    model = llama()
    stored = write_gguf(tmp_path / "model.gguf", model, kind, embedding=Kind.Q8_0)
    hf, store = open_gguf(tmp_path / "model.gguf")
    for name, array in stored.items():
        tensor = store[name].read()
        assert tensor.dtype == store[name].dtype == torch.float32
        used = Kind.F32 if array.ndim == 1 else Kind.Q8_0 if "embed" in name else kind
        assert torch.equal(tensor, torch.from_numpy(dequantize(array, used).copy())), name
        close = 0.2 if kind != Kind.Q8_0 else 0.02
        assert (tensor - model.get_parameter(name)).abs().max() < close * tensor.abs().max()
    family, config = model_config(hf, store)
    assert config.dtype == "float32"
    assert len(to_megatron(family, config, store)) == 3 + 3 * 6


@pytest.mark.parametrize(("kind", "dtype"), [(Kind.F16, "float16"), (Kind.BF16, "bfloat16")])
def test_half_precision_files_keep_their_dtype(tmp_path, kind, dtype):
    model = llama()
    write_gguf(tmp_path / "model.gguf", model, kind)
    hf, store = open_gguf(tmp_path / "model.gguf")
    assert model_config(hf, store)[1].dtype == dtype
    name = "model.layers.1.self_attn.k_proj.weight"
    wanted = model.get_parameter(name).to(getattr(torch, dtype))
    assert torch.equal(store[name].read(), wanted)
    assert store["model.norm.weight"].read().dtype == torch.float32


def test_mixed_half_precision_becomes_float32(tmp_path):
    write_gguf(tmp_path / "model.gguf", llama(), Kind.F16, embedding=Kind.BF16)
    _, store = open_gguf(tmp_path / "model.gguf")
    assert {tensor.dtype for tensor in store.values()} == {torch.float32}
    assert {tensor.read().dtype for tensor in store.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": "qwen2"}, "general.architecture=qwen2 is not supported; supported: llama"),
        ({"fields": {"llama.expert_count": 8}}, "mixture of experts"),
        ({"fields": {"llama.rope.scaling.type": "linear"}}, "llama.rope.scaling is set"),
        ({"fields": {"llama.rope.scaling.factor": 4.0}}, "llama.rope.scaling is set"),
        ({"fields": {"llama.rope.scale_linear": 4.0}}, "llama.rope.scaling is set"),
        (
            {"fields": {"split.count": 2, "split.no": 0}, "drop": "layers.2."},
            r"model.gguf is one of split.count=2 files; merge them \(llama-gguf-split --merge",
        ),
        ({"extra": {"rope_freqs.weight": np.ones(8, np.float32)}}, "scaled rotary frequencies"),
        ({"extra": {"blk.0.attn_q.bias": np.ones(8, np.float32)}}, r"\['blk.0.attn_q.bias'\]"),
        ({"drop": "layers.2.mlp.up"}, r"lacks model.layers.2.mlp.up_proj.weight \(as blk.2.ffn_up"),
        ({"drop": "embed_tokens"}, "lacks the tensor token_embd.weight"),
    ],
)
def test_models_that_cannot_be_imported(tmp_path, changes, message):
    write_gguf(tmp_path / "model.gguf", llama(), **changes)
    with pytest.raises(ValueError, match=message):
        open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K])
def test_k_quants_are_dequantised_too(tmp_path, kind):
    """The gguf package cannot quantise to them, so the blocks are random, scales small."""
    block, size = GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 60, (64, 256 // block * size), np.uint8)
    write_raw(tmp_path / "model.gguf", data, kind)
    _, store = open_gguf(tmp_path / "model.gguf")
    tensor = store["model.layers.0.self_attn.v_proj.weight"]
    assert (tensor.shape, tensor.dtype) == ((64, 256), torch.float32)
    assert torch.equal(tensor.read(), torch.from_numpy(dequantize(data, kind).copy()))


@pytest.mark.parametrize("kind", [Kind.IQ4_NL, Kind.TQ1_0, Kind.MXFP4, Kind.I8, Kind.F64])
def test_other_kinds_are_named(tmp_path, kind):
    block, size = GGML_QUANT_SIZES[kind]
    write_raw(tmp_path / "model.gguf", np.zeros((64, 256 // block * size), np.uint8), kind)
    says = rf"model.gguf: blk.0.attn_v.weight is {kind.name}; supported: .*'Q4_0'"
    with pytest.raises(ValueError, match=says):
        open_gguf(tmp_path / "model.gguf")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("llama.block_count", 2, r"holds tensors without a row .*'blk.2.attn_k.weight'"),
        ("llama.block_count", 4, r"lacks model.layers.3.input_layernorm.weight \(as blk.3.attn_no"),
        (
            "llama.feed_forward_length",
            64,
            r"model.gguf: model.layers.0.mlp.gate_proj.weight has shape \(96, 64\); config.json "
            r"asks for \(64, 64\)",
        ),
        (
            "llama.attention.head_count_kv",
            4,
            r"k_proj.weight has shape \(32, 64\); config.json asks",
        ),
    ],
)
def test_metadata_that_do_not_fit(tmp_path, name, value, message):
    write_gguf(tmp_path / "model.gguf", llama(), changed={name: value})
    with pytest.raises(ValueError, match=message):
        open_source(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("llama.attention.head_count", [4, 4, 2], "int"),
        ("llama.attention.head_count_kv", [2, 2, 1], "int"),
        ("llama.attention.head_count", 0, "int"),
        ("llama.feed_forward_length", [96, 96, 64], "int"),
        ("llama.block_count", "3", "int"),
        ("llama.context_length", "64", "int"),
        ("llama.rope.freq_base", "10000", "float"),
        ("llama.attention.layer_norm_rms_epsilon", "1e-5", "float"),
    ],
)
def test_metadata_of_other_types(tmp_path, name, value, kind):
    write_gguf(tmp_path / "model.gguf", llama(), changed={name: value})
    says = (
        f"{name}={value} must be of type {kind}, above 0 and the same for every layer; set source"
    )
    with pytest.raises(ValueError, match=re.escape(says)):
        open_gguf(tmp_path / "model.gguf")


def test_sizes_may_be_lists_with_an_entry_for_each_layer(tmp_path):
    """As llama.cpp reads them."""
    lists = {"head_count": [4] * 3, "head_count_kv": [2] * 3}
    changed = {f"llama.attention.{name}": sizes for name, sizes in lists.items()}
    changed["llama.feed_forward_length"] = [96] * 3
    write_gguf(tmp_path / "model.gguf", llama(), changed=changed)
    write_gguf(tmp_path / "numbers.gguf", llama())
    assert open_gguf(tmp_path / "model.gguf")[0] == open_gguf(tmp_path / "numbers.gguf")[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.factor": 1.0},
        {"llama.rope.scaling.factor": 0.0},
        {"split.count": 1},
    ],
)
def test_fields_that_change_nothing(tmp_path, fields):
    write_gguf(tmp_path / "model.gguf", llama(), fields=fields)
    assert "rope_scaling" not in open_gguf(tmp_path / "model.gguf")[0]


@pytest.mark.parametrize("kind", [Kind.F32, Kind.BF16, Kind.Q8_0])
def test_another_byte_order(tmp_path, monkeypatch, kind):
    """The gguf package turns neither the bytes of bfloat16 nor those of blocks."""
    other = GGUFEndian.BIG if sys.byteorder == "little" else GGUFEndian.LITTLE
    monkeypatch.setattr(gguf_fixtures, "GGUFWriter", partial(GGUFWriter, endianess=other))
    write_gguf(tmp_path / "model.gguf", llama(), kind)
    with pytest.raises(ValueError, match="in the byte order of another kind of machine; set sourc"):
        open_gguf(tmp_path / "model.gguf")


def test_special_tokens_that_no_token_is(tmp_path):
    """llama.cpp passes over such ids."""
    path = tmp_path / "model.gguf"
    write_gguf(path, llama(), changed={"tokenizer.ggml.padding_token_id": 2**32 - 1})
    hf, _ = open_gguf(path)
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, 0, None)
    assert "pad_token" not in gguf_tokenizer(path)[1]


def test_damaged_files(tmp_path):
    path = tmp_path / "model.gguf"
    write_gguf(path, llama())
    data = path.read_bytes()
    for content in (b"", b"not a model", data[:5000], data[:-1000]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"model.gguf is not a GGUF file, or is truncated"):
            open_gguf(path)
    with pytest.raises(ValueError, match=r"nothing.gguf does not exist"):
        open_gguf(tmp_path / "nothing.gguf")

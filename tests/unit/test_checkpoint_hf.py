import json
import math
import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from nemo_minitron.checkpoint.hf import model_config, open_hf, to_hf, to_megatron, write_hf
from nemo_minitron.checkpoint.lazy import from_tensor, on_read, refuse_nonfinite
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from tests.unit.test_families import LLAMA3_ROPE, hf_llama


def save_model(folder, dtype=torch.float32, max_shard_size="5GB", **overrides):
    torch.manual_seed(0)
    model = LlamaForCausalLM(hf_llama(**overrides)).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A sharded, untied model."""
    return save_model(tmp_path_factory.mktemp("good"), max_shard_size="60KB")


@pytest.fixture
def folder(good, tmp_path):
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "model")


def logits(folder):
    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.no_grad():
        return model(torch.arange(20)[None]).logits


@pytest.mark.parametrize(
    ("dtype", "shard", "overrides"),
    [
        (torch.float32, "5GB", {"num_key_value_heads": 4}),
        (torch.float32, "30KB", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
        (torch.bfloat16, "20KB", {"num_key_value_heads": 1, "head_dim": 8}),
        (torch.float16, "5GB", {"head_dim": None}),
        (torch.bfloat16, "5GB", {"rope_scaling": LLAMA3_ROPE, "rope_theta": 5e5}),
    ],
)
def test_import_and_export_return_equal_tensors_and_logits(tmp_path, dtype, shard, overrides):
    source = save_model(tmp_path / "source", dtype, shard, **overrides)
    hf_config, hf_store = open_hf(source)
    family, config = model_config(hf_config, hf_store)
    assert config.dtype == str(dtype).removeprefix("torch.")
    checkpoint, exported = tmp_path / "checkpoint", tmp_path / "exported"
    checkpoint.mkdir()
    exported.mkdir()
    store = to_megatron(family, config, hf_store)
    write_torch_dist(checkpoint, store, family, config, workers=2)
    back = to_hf(family, config, read_torch_dist(checkpoint, family, config))
    files = write_hf(exported, back, family.to_hf(config), shard)
    assert ("model.safetensors.index.json" in [p.name for p in exported.iterdir()]) == (
        shard != "5GB"
    )
    assert set(back) == set(hf_store)
    assert ("lm_head.weight" in back) == (not config.share_embeddings_and_output_weights)
    written = {name: t for file in files for name, t in load_file(exported / file).items()}
    for name, tensor in hf_store.items():
        assert torch.equal(written[name], tensor.read()), name
        assert written[name].dtype == dtype
    assert torch.equal(logits(exported), logits(source))


def test_fused_tensors_are_read_once_per_export(good):
    hf_config, hf_store = open_hf(good)
    family, config = model_config(hf_config, hf_store)
    store = to_megatron(family, config, hf_store)
    read: Counter[str] = Counter()
    counted = on_read(store, lambda name, part: read.update({name: part.numel()}))
    for tensor in to_hf(family, config, counted).values():
        tensor.read()
    assert read == {name: math.prod(tensor.shape) for name, tensor in store.items()}


def rewrite(folder, change):
    """Apply ``change`` to the config.json of ``folder``."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def import_(folder):
    hf_config, hf_store = open_hf(folder)
    family, config = model_config(hf_config, hf_store)
    return to_megatron(family, config, hf_store)


def shard_of(folder, name):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


def edit_shard(folder, name, change):
    """Load the shard that holds ``name``, change the dictionary of its tensors, save it."""
    path = shard_of(folder, name)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_no_config(folder):
    (folder / "config.json").unlink()
    with pytest.raises(
        ValueError, match=r"not a Hugging Face model folder: config.json is missing"
    ):
        import_(folder)


def test_damaged_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json cannot be read"):
        import_(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["BertModel"], r"architectures=\['BertModel'\].*supported: .*'LlamaFor"),
        ("num_hidden_layers", None, "config.json lacks 'num_hidden_layers'"),
        ("hidden_size", "48", r"hidden_size=.48. of the model must be a whole number"),
        ("rms_norm_eps", "1e-5", r"layernorm_epsilon=.1e-5. of the model must be a finite number"),
        ("quantization_config", {"quant_method": "gptq"}, r"quantised .*\(quant_method=gptq\)"),
        (
            "quantization_config",
            {"quant_method": "fp8"},
            r"config.json: quantization_config .*=fp8",
        ),
        ("quantization_config", {"load_in_4bit": True}, r"quantised .*quant_method=None"),
        ("compression_config", {"format": "int"}, "config.json: compression_config says"),
        (
            "num_hidden_layers",
            2,
            r"9 tensors have no row .*model.layers.2.* \(in .*\.safetensors.*\); "
            "num_hidden_layers=2 in config.json, but the weights are of 3 layers",
        ),
        (
            "num_hidden_layers",
            4,
            r"9 tensors that config.json asks for are missing.*layers.3.*; num_hidden_layers=4 in "
            "config.json, but the weights are of 3 layers",
        ),
        ("intermediate_size", 44, r"gate_proj.weight has shape \(40, 48\).*asks for \(44, 48\)"),
        (
            "vocab_size",
            100,
            r"\.safetensors: model.embed_tokens.weight has shape \(101, 48\); config.json asks for "
            r"\(100, 48\) \(vocab, hidden\)",
        ),
    ],
)
def test_config_that_does_not_fit(folder, key, value, message):
    def change(config):
        if value is None:
            del config[key]
        else:
            config[key] = value

    with pytest.raises(ValueError, match=message):
        import_(rewrite(folder, change))


def test_no_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"holds no .safetensors file"):
        import_(folder)


def test_shards_without_index(folder):
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(
        ValueError, match=r"\d .safetensors files but no model.safetensors.index.json"
    ):
        import_(folder)


def test_missing_shard(folder):
    path = shard_of(folder, "model.norm.weight")
    path.unlink()
    with pytest.raises(ValueError, match=rf"{path.name} is missing although .*index.json lists it"):
        import_(folder)


def test_truncated_shard(folder):
    path = shard_of(folder, "model.norm.weight")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=rf"{path.name} is truncated or damaged"):
        import_(folder)


def test_index_that_disagrees(folder):
    edit_shard(folder, "model.norm.weight", lambda t: t.update(other=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"disagree: the file lacks \[\] and holds \['other'\]"):
        import_(folder)


def test_index_that_puts_a_tensor_elsewhere(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    other = index["weight_map"]["model.embed_tokens.weight"]
    assert other != index["weight_map"]["model.norm.weight"]
    index["weight_map"]["model.norm.weight"] = other
    path.write_text(json.dumps(index))
    says = r"\.safetensors and .*index.json disagree: the file .*\['model.norm.weight'\]"
    with pytest.raises(ValueError, match=says):
        import_(folder)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({}, "index.json holds no weight_map"),
        ({"weight_map": {}}, "index.json holds no weight_map"),
        ({"weight_map": {"x": 1}}, "index.json: weight_map gives x the file 1, not a name"),
        ([], "index.json must hold a JSON object"),
    ],
)
def test_index_that_is_none(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        import_(folder)


def test_two_models_in_one_folder(folder):
    save_file({"model.norm.weight": torch.ones(48)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds both model.safetensors and .*index.json"):
        import_(folder)


def test_files_without_tensors(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"the .safetensors files hold no tensor"):
        import_(folder)


def test_unexpected_tensor(folder):
    name, path = "model.layers.0.self_attn.q_proj.bias", shard_of(folder, "model.norm.weight")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_shard(folder, "model.norm.weight", lambda t: t.update({name: torch.zeros(64)}))
    with pytest.raises(
        ValueError, match=rf"1 tensors have no row .*'{name}'\] \(in .*{path.name}\)"
    ):
        import_(folder)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "F64"),
        (torch.int8, "I8"),  # bitsandbytes in 8 bits
        (torch.uint8, "U8"),  # and in 4
        (torch.int32, "I32"),  # GPTQ, AWQ
        (torch.float8_e4m3fn, "F8_E4M3"),
    ],
)
def test_unsupported_dtype(folder, dtype, name):
    norm = "model.norm.weight"
    edit_shard(folder, norm, lambda t: t.update({norm: t[norm].to(dtype)}))
    path = shard_of(folder, norm)
    says = rf"{path.name}: {norm} is {name}; supported: \['BF16', 'F16', 'F32'\]"
    with pytest.raises(ValueError, match=says):
        import_(folder)


def test_missing_output_embedding_tells_about_tying(tmp_path):
    source = save_model(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"lm_head.weight.*tie_word_embeddings=true"):
        import_(rewrite(source, lambda config: config.update(tie_word_embeddings=False)))


def test_tied_model_may_hold_a_copy_and_old_buffers(folder):
    rewrite(folder, lambda config: config.update(tie_word_embeddings=True))
    name = "model.embed_tokens.weight"
    embedding = load_file(shard_of(folder, name))[name]
    edit_shard(folder, "lm_head.weight", lambda t: t.update({"lm_head.weight": embedding.clone()}))
    path = shard_of(folder, "lm_head.weight")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    index["weight_map"][buffer] = path.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    edit_shard(folder, "lm_head.weight", lambda t: t.update({buffer: torch.zeros(8)}))
    assert "output_layer.weight" not in import_(folder)


def test_tied_model_with_another_output_embedding(folder):
    """transformers takes both, and only warns."""
    rewrite(folder, lambda config: config.update(tie_word_embeddings=True))
    says = r"lm_head.weight is not equal to model.embed_tokens.weight, although config.json ties"
    with pytest.raises(ValueError, match=says):
        import_(folder)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_is_named(bad, dtype):
    tensor = torch.ones(5, 4, dtype=dtype)
    tensor[2, 3] = bad
    store = on_read({"model.x.weight": from_tensor(tensor)}, refuse_nonfinite)
    with pytest.raises(ValueError, match=r"model.x.weight holds 1 NaN or infinite values of 20"):
        store["model.x.weight"].read()


def test_a_sum_that_overflows_is_not_nan():
    refuse_nonfinite("x", torch.full((100,), 60000.0, dtype=torch.float16))


def test_dtype_comes_from_the_weights(folder, caplog):
    rewrite(folder, lambda config: config.update(dtype="bfloat16"))
    _, config = model_config(*open_hf(folder))
    assert config.dtype == "float32"
    assert "weights are float32 although config.json says bfloat16" in caplog.text


def test_parts_of_different_dtypes_are_refused(tmp_path):
    source = save_model(tmp_path, torch.bfloat16)
    name, other = (f"model.layers.1.self_attn.{x}_proj.weight" for x in "kq")
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, name: tensors[name].float()}, source / "model.safetensors")
    says = (
        rf"model.safetensors: {name} is torch.float32 but {other}, which it is joined with, is "
        "torch.bfloat16; convert the source to one dtype"
    )
    with pytest.raises(ValueError, match=says):
        import_(source)


def test_one_tensor_of_another_dtype(folder):
    name = "model.layers.1.mlp.down_proj.weight"
    edit_shard(folder, name, lambda t: t.update({name: t[name].half()}))
    says = rf"\.safetensors: {name} is torch.float16 although most weights are torch.float32; conv"
    with pytest.raises(ValueError, match=says):
        import_(folder)


def test_float32_norms_of_a_half_precision_model_stay(tmp_path):
    source = save_model(tmp_path, torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors")
    store = import_(source)
    assert store["decoder.final_layernorm.weight"].dtype == torch.float32
    assert store["output_layer.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("size", ["many", "5", "5XB", ""])
def test_shard_size_must_be_a_size(tmp_path, size):
    with pytest.raises(ValueError, match=f"max_shard_size={size} must be a number with KB, MB"):
        write_hf(tmp_path, {}, {}, size)


def test_written_files_are_as_public_as_others(good, tmp_path):
    hf_config, hf_store = open_hf(good)
    write_hf(tmp_path, hf_store, hf_config, "5GB")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_smaller_model_keeps_its_head_dim(good, tmp_path):
    """A pruned hidden size no longer follows from the heads."""
    hf_config, hf_store = open_hf(good)
    family, config = model_config(hf_config, hf_store)
    config = replace(config, hidden_size=36, num_layers=1)
    store = {}
    for _, row, layer in family.parameters(config):
        for name in row.hf:
            tensor = hf_store[name.format(layer=layer)].read()
            if "hidden" in row.dims:
                tensor = tensor.narrow(row.dims.index("hidden"), 0, 36).contiguous()
            store[name.format(layer=layer)] = from_tensor(tensor)
    write_hf(tmp_path, store, family.to_hf(config), "5GB")
    assert logits(tmp_path).shape == (1, 20, 101)

"""Folders that look like a model: adapters, pointers of Git LFS, other dtypes, other prefixes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from nemo_minitron import cli
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.config.inference import GenerateConfig
from nemo_minitron.data.prompts import read_prompts
from nemo_minitron.data.text import find_source
from nemo_minitron.families.registry import written_config
from tests.helpers.sources import write_tokenizer
from tests.unit.test_families import hf_llama

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 497669\n"
SAYS_POINTER = r"is a git-lfs pointer, not the file itself: run .*'git lfs pull'"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("good")
    LlamaForCausalLM(hf_llama(tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def rename(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({change(name): tensor for name, tensor in tensors.items()}, path)


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_source(str(folder))


# ---------------------------------------------------------------- adapters


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.bin"])
def test_an_adapter_beside_its_base_model(folder, name):
    (folder / name).write_text("{}")
    refused(folder, rf"holds an adapter \({name}\).*merge_and_unload.*without {name}")


def test_an_adapter_alone(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").unlink()
    refused(folder, r"holds an adapter \(adapter_config.json\)")
    (folder / "config.json").unlink()
    refused(folder, r"holds an adapter \(adapter_config.json\)")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.base_layer.weight",
    ],
)
def test_an_adapter_among_the_weights(folder, name):
    path = folder / "model.safetensors"
    save_file({**load_file(path), name: torch.zeros(4, 48)}, path)
    refused(folder, rf"model.safetensors holds an adapter, such as LoRA \(its tensor {name}\)")


def test_an_adapter_in_gguf(tmp_path):
    writer = GGUFWriter(tmp_path / "adapter.gguf", "llama")
    writer.add_type("adapter")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "adapter.gguf", "general.type=adapter is not supported; .*whole model")


# ---------------------------------------------------------------- Git LFS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_pointers_of_git_lfs(folder, name):
    (folder / name).write_text(POINTER)
    refused(folder, rf"{name} {SAYS_POINTER}")


def test_pointers_in_place_of_an_index(folder):
    (folder / "model.safetensors.index.json").write_text(POINTER)
    refused(folder, rf"model.safetensors.index.json {SAYS_POINTER}")


@pytest.mark.parametrize("name", ["model.gguf", "model.nemo"])
def test_pointers_in_place_of_an_archive(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    refused(tmp_path / name, rf"{name} {SAYS_POINTER}")


def test_pointers_in_a_megatron_checkpoint(tmp_path):
    (tmp_path / ".metadata").write_text(POINTER)
    (tmp_path / "metadata.json").write_text("{}")
    (tmp_path / "common.pt").write_text(POINTER)
    refused(tmp_path, SAYS_POINTER)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.npy", "a.bin"])
def test_pointers_in_place_of_data(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    (tmp_path / "a.idx").write_text("")
    with pytest.raises(ValueError, match=rf"{name} {SAYS_POINTER}"):
        find_source(tmp_path / name)


def test_a_pointer_in_a_folder_of_data(tmp_path):
    (tmp_path / "a.txt").write_text("Some text.")
    (tmp_path / "b.jsonl").write_text(POINTER)
    with pytest.raises(ValueError, match=rf"b.jsonl {SAYS_POINTER}"):
        find_source(tmp_path)


def test_a_pointer_in_place_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text(POINTER)
    cfg = GenerateConfig(checkpoint="c", prompts=str(tmp_path / "prompts.txt"), output_dir="o")
    with pytest.raises(ValueError, match=rf"prompts.txt {SAYS_POINTER}"):
        read_prompts(cfg, None, context=8)


# ---------------------------------------------------------------- dtypes and formats


@pytest.mark.parametrize(
    ("dtype", "way_out"),
    [
        (torch.float64, r"F64; supported: .*; convert the weights to float32 first"),
        (torch.float8_e4m3fn, r"F8_E4M3; supported: .*; these are quantised weights"),
        (torch.int8, r"I8; supported: .*; set source to a model that is not quantised"),
        (torch.bool, r"BOOL; supported: .*; no weight of a model is of that dtype"),
        (torch.complex64, r"C64; supported: .*; no weight of a model is of that dtype"),
    ],
)
def test_dtypes_that_are_not_imported(folder, dtype, way_out):
    path = folder / "model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(path).items()}, path)
    refused(folder, way_out)


def test_weights_in_the_format_of_mistral(folder):
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert open_source(str(folder)).store
    (folder / "model.safetensors").unlink()
    refused(folder, r"consolidated.safetensors alone, which is in the format of Mistral's own")


# ---------------------------------------------------------------- prefixes


def test_names_of_the_bare_model(good, folder):
    """As LlamaModel.save_pretrained writes them, which transformers opens as well."""
    rename(folder, lambda name: name.removeprefix("model."))
    found, expected = open_source(str(folder)).store, open_source(str(good)).store
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].read(), expected[name].read()) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: "module." + name, r"contain 'module\.' .*data parallel training adds it"),
        (lambda name: "_orig_mod." + name, r"contain '_orig_mod\.' .*torch.compile"),
        (
            lambda name: name.replace("model.", "model._orig_mod."),
            r"contain '_orig_mod\.' .*torch.compile",
        ),
        (lambda name: "base_model.model." + name, r"contain 'base_model\.model\.' .*PEFT"),
        (lambda name: "language_model." + name, r"contain 'language_model\.' .*text and images"),
        (
            lambda name: name.replace("model.", "model.language_model."),
            r"contain 'language_model\.' .*text and images",
        ),
        (lambda name: "student." + name, r"names of tensors start with 'student\.'"),
    ],
)
def test_prefixes_that_transformers_does_not_open(folder, change, message):
    rename(folder, change)
    refused(folder, message)


# ---------------------------------------------------------------- code that is not carried over


def test_an_export_names_no_code(folder, tmp_path, monkeypatch):
    """It opens whether or not remote code is allowed."""
    monkeypatch.chdir(tmp_path)
    stale = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.X"}
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": stale}))
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "auto_map": {"AutoTokenizer": "x.X"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    cli.main(["import", f"source={folder}", "output_dir=ck"])
    cli.main(["export", "checkpoint=ck", "output_dir=hf"])
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "hf" / name).read_text())
    for trusted in (False, True):
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=trusted)


# ---------------------------------------------------------------- rows beyond the tokenizer


def test_rows_beyond_the_tokenizer_can_be_left_out(good, folder):
    """Two models of one tokenizer that are padded differently get equal sizes."""
    write_tokenizer(folder, 97)
    opened, whole = (open_source(str(folder), vocab_size=size) for size in (97, None))
    assert (opened.config.vocab_size, whole.config.vocab_size) == (97, 101)
    name = "embedding.word_embeddings.weight"
    assert opened.store[name].shape == (97, 48)
    assert torch.equal(opened.store[name].read(), whole.store[name].read()[:97])
    assert written_config(opened.config)["vocab_size"] == 97


@pytest.mark.parametrize("size", [96, 102])
def test_rows_of_tokens_stay_and_none_are_made(folder, size):
    write_tokenizer(folder, 97)
    says = rf"vocab_size={size} must be between .* tokenizer \(97\) and the 101 rows"
    with pytest.raises(ValueError, match=says):
        open_source(str(folder), vocab_size=size)

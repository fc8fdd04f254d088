import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_minitron.checkpoint.artifact import open_result
from nemo_minitron.checkpoint.tokenizer import save_tokenizer
from nemo_minitron.checkpoint.tokenizer_read import load_tokenizer
from nemo_minitron.config.stages import ExportConfig, ImportConfig
from nemo_minitron.stages import export, import_
from tests.helpers.gguf_fixtures import TEXT, llama, tokenizer, write_gguf


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A Hugging Face folder with everything a user may have in it."""
    folder = tmp_path_factory.mktemp("source")
    model = llama(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0, "temperature": 0.5}')
    write_gguf(folder / "model.gguf", llama())
    save_tokenizer(folder / "model.gguf", folder)
    (folder / "model.gguf").unlink()
    return folder


def run_import(source: Path, output: Path, **keys) -> Path:
    cfg = ImportConfig(source=str(source), output_dir=str(output), **keys)
    import_.check(cfg)
    import_.run(cfg)
    return output


def run_export(checkpoint: Path, output: Path, **keys) -> Path:
    cfg = ExportConfig(checkpoint=str(checkpoint), output_dir=str(output), **keys)
    export.check(cfg)
    export.run(cfg)
    return output


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory) -> Path:
    return run_import(source, tmp_path_factory.mktemp("results") / "imported")


def test_import_and_export_of_a_folder(source, imported, tmp_path):
    names = {path.name for path in (imported / "checkpoint").iterdir()}
    assert {".metadata", "metadata.json", "common.pt", "model.yaml", "tokenizer"} <= names
    open_result(imported, "full")
    metrics = json.loads((imported / "metrics.json").read_text())
    parameters = sum(tensor.numel() for tensor in load_file(source / "model.safetensors").values())
    assert metrics["parameters"] == parameters
    assert (metrics["dtype"], metrics["bytes"]) == ("bfloat16", 2 * parameters)
    exported = run_export(imported, tmp_path / "exported", max_shard_size="50KB")
    open_result(exported, "full")
    before, after = (
        AutoModelForCausalLM.from_pretrained(p, dtype="auto") for p in (source, exported)
    )
    assert after.dtype == torch.bfloat16
    for name, tensor in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], tensor), name
    ids = AutoTokenizer.from_pretrained(exported)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(after(ids).logits, before(ids).logits)
    assert after.generation_config.temperature == 0.5
    assert len(list(exported.glob("*.safetensors"))) > 1
    assert f"{parameters:,} parameters" in (exported / "README.md").read_text()


def test_import_and_export_of_a_gguf_file(tmp_path):
    stored = write_gguf(tmp_path / "model.gguf", llama(), Kind.Q4_1)
    imported = run_import(tmp_path / "model.gguf", tmp_path / "imported")
    assert load_tokenizer(imported / "checkpoint" / "tokenizer").decode([3, 4])
    exported = run_export(imported, tmp_path / "exported")
    assert set(load_file(exported / "model.safetensors")) == set(stored)
    model = AutoModelForCausalLM.from_pretrained(exported)
    ids = AutoTokenizer.from_pretrained(exported)("In 1776", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=3, do_sample=False).shape[0] == 1


def test_same_source_gives_the_same_result(source, imported, tmp_path):
    again = run_import(source, tmp_path / "again", workers=1)
    assert open_result(again).id == open_result(imported).id


def test_model_without_a_tokenizer(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    exported = run_export(run_import(folder, tmp_path / "imported"), tmp_path / "exported")
    assert not list(exported.glob("tokenizer*"))


def test_nan_is_refused_and_leaves_nothing(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight holds 1 NaN.*set source"):
        run_import(folder, tmp_path / "imported")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_damage_found_while_writing_leaves_nothing(source, tmp_path, monkeypatch):
    """In a model too large for the checks to read whole."""
    monkeypatch.setattr(import_, "_READ_UP_TO", 0)
    folder = shutil.copytree(source, tmp_path / "source")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("inf")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.norm.weight holds 1 NaN or infinite.*set source"):
        run_import(folder, tmp_path / "imported")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_unknown_source(tmp_path):
    with pytest.raises(ValueError, match=r"source=some/model does not exist; give a Hugging Face"):
        run_import(Path("some/model"), tmp_path / "imported")
    (tmp_path / "file.bin").write_text("x" * 100)
    with pytest.raises(ValueError, match=r"file.bin is not a GGUF file"):
        run_import(tmp_path / "file.bin", tmp_path / "imported")


def test_a_tokenizer_that_is_a_file(source, tmp_path):
    """A result of a folder or of a GGUF file takes it as those of Megatron do."""
    other = tmp_path / "other" / "tokenizer.json"
    other.parent.mkdir()
    tokenizer().save(str(other))
    write_gguf(tmp_path / "model.gguf", llama())
    for number, path in enumerate((source, tmp_path / "model.gguf")):
        imported = run_import(path, tmp_path / f"imported{number}", tokenizer=str(other))
        copied = imported / "checkpoint" / "tokenizer" / "tokenizer.json"
        assert copied.read_bytes() == other.read_bytes()


def test_a_tokenizer_that_cannot_be_built_is_refused_before_weights_are_read(tmp_path):
    """Whatever the name of the file is."""
    write_gguf(tmp_path / "blob", llama(), pre="qwen2")
    cfg = ImportConfig(source=str(tmp_path / "blob"), output_dir=str(tmp_path / "imported"))
    with pytest.raises(ValueError, match=r"tokenizer.ggml.pre=qwen2 is not supported"):
        import_.check(cfg)


def test_complete_result_is_not_replaced_unasked(source, imported):
    with pytest.raises(ValueError, match=r"already holds a complete result; set overwrite=true"):
        run_import(source, imported)


def test_export_refuses_what_is_no_checkpoint(source, imported, tmp_path):
    output = tmp_path / "exported"
    with pytest.raises(ValueError, match=r"not a complete result but a model .* import source="):
        run_export(source, output)
    with pytest.raises(ValueError, match=r"give the result folder .*imported itself"):
        run_export(imported / "checkpoint", output)
    with pytest.raises(ValueError, match=r"max_shard_size=big must be a number"):
        run_export(imported, output, max_shard_size="big")
    damaged = shutil.copytree(imported, tmp_path / "damaged")
    path = damaged / "checkpoint" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"__0_0.distcp is changed"):
        run_export(damaged, output)
    path.write_bytes(data[:-9])
    with pytest.raises(ValueError, match=r"__0_0.distcp is truncated"):
        run_export(damaged, output, verify_inputs="size")


def test_full_disk_leaves_the_old_result(source, imported, tmp_path, monkeypatch):
    result = shutil.copytree(imported, tmp_path / "imported")
    before = open_result(result).id

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"No space left"):
        run_import(source, result, overwrite=True)
    assert open_result(result, "full").id == before
    assert [path.name for path in tmp_path.iterdir()] == ["imported"]

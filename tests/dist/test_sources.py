"""Checkpoints of Megatron-LM, Megatron-Bridge, NeMo 2 and NeMo 1, and .nemo archives of our own.

Weights are written by Megatron-Core's own API at TP 2 x PP 2.
"""

import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ExportConfig, ImportConfig
from nemo_minitron.stages import export, import_
from tests.cases.live_truth import layout
from tests.cases.source import (
    local_weights,
    logits_of,
    nemo_config,
    restore_nemo,
    save_as,
    save_nemo,
)
from tests.helpers import sources, tiny
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import random_weights, read_weights, token_batch, write_result

SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA = replace(tiny.LLAMA, rotary_base=500000.0, rope_scaling=SCALING)
# Megatron-LM builds models with this factor, whatever its arguments say.
BY_EIGHT = replace(LLAMA, rope_scaling={**SCALING, "factor": 8.0})
TIED = replace(tiny.QWEN3, family="qwen2", qk_layernorm=False, add_qkv_bias=True)
TIED = replace(TIED, share_embeddings_and_output_weights=True)
SQUARE = replace(tiny.NEMOTRON, max_position_embeddings=64)
NON_HOMOGENEOUS = {"non_homogeneous_layers": True}


def run_import(source: Path, output: Path, **keys: Any) -> Path:
    cfg = ImportConfig(source=str(source), output_dir=str(output), **keys)
    import_.check(cfg)
    import_.run(cfg)
    return output


def compare(imported: Path, config: ModelConfig, seed: int = 0) -> None:
    found = ModelConfig.load(imported / "checkpoint")
    assert replace(found, hf={}) == config
    weights = random_weights(config, seed)
    back = read_weights(imported)
    assert back.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(back[name], tensor), name


@pytest.fixture(scope="module")
def home(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama at TP 2 x PP 2 in every layout, and other families alone."""
    home = tmp_path_factory.mktemp("sources")
    args = {"args": sources.megatron_args(BY_EIGHT), "iteration": 10, "checkpoint_version": 3.0}
    write_result(home / "llama", LLAMA, 0)
    write_result(home / "by_eight", BY_EIGHT, 0)
    targets = {
        str(home / "lm" / "iter_0000010"): ("", {}, args),
        str(home / "bridge" / "iter_0000010"): ("", NON_HOMOGENEOUS, {"iteration": 10}),
        str(home / "nemo2" / "weights"): ("module.", {}, {"epoch": 1}),
        str(home / "nemo1" / "model_weights"): ("model.", {}, {}),
    }
    checkpoint = str(home / "llama" / "checkpoint")
    ranks.run(4, save_as, LLAMA, layout(tp=2, pp=2), checkpoint, targets)
    for name in ("lm", "bridge"):
        (home / name / "latest_checkpointed_iteration.txt").write_text("10")
    sources.write_bridge(home / "bridge" / "iter_0000010", LLAMA)
    sources.write_nemo2(home / "nemo2", LLAMA)
    return home


@pytest.mark.parametrize(
    "source", ["lm", "lm/iter_0000010", "bridge", "bridge/iter_0000010", "nemo2", "nemo2/weights"]
)
def test_layouts(home: Path, tmp_path: Path, source: str) -> None:
    expected = BY_EIGHT if source.startswith("lm") else LLAMA
    compare(run_import(home / source, tmp_path / "out"), expected)


def test_logits(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    results = {"ours": str(home / "llama"), "by_eight": str(home / "by_eight")}
    for name in ("lm", "bridge", "nemo2"):
        results[name] = str(run_import(home / name, tmp_path / name))
    ids = token_batch(2, 15, LLAMA.vocab_size)
    (found,) = ranks.run(1, logits_of, results, ids, layout())
    for name in ("bridge", "nemo2"):
        assert torch.equal(found[name], found["ours"]), name
    assert torch.equal(found["lm"], found["by_eight"])


def test_what_comes_along(home: Path, tmp_path: Path) -> None:
    """Tokenizer, generation config and the ids of special tokens."""
    imported = run_import(home / "bridge", tmp_path / "out")
    tokenizer = imported / "checkpoint" / "tokenizer"
    theirs = home / "bridge" / "iter_0000010" / "tokenizer" / "tokenizer.json"
    assert (tokenizer / "tokenizer.json").read_bytes() == theirs.read_bytes()
    generation = json.loads((tokenizer / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6}
    out = tmp_path / "hf"
    export.run(ExportConfig(checkpoint=str(imported), output_dir=str(out)))
    written = json.loads((out / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (98, 99)


@pytest.mark.parametrize("packed", [True, False])
def test_nemo1(home: Path, tmp_path: Path, packed: bool) -> None:
    """An archive, read where it lies, and the same unpacked."""
    folder = shutil.copytree(home / "nemo1", tmp_path / "nemo1")
    said = sources.nemo1_config(BY_EIGHT, scale_positional_embedding=True, rotary_base=500000)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(said))
    vocab = {f"t{i}": i for i in range(BY_EIGHT.vocab_size)}
    (folder / "ab_vocab.json").write_text(json.dumps(vocab))
    if packed:
        with tarfile.open(tmp_path / "model.nemo", "w:") as tar:
            tar.add(folder, arcname=".")
        shutil.rmtree(folder)
        folder = tmp_path / "model.nemo"
    imported = run_import(folder, tmp_path / "out")
    compare(imported, BY_EIGHT)
    assert (imported / "checkpoint" / "tokenizer" / "vocab.json").is_file()


def test_nemo1_of_one_file(tmp_path: Path) -> None:
    """``model_weights.ckpt``: weights are read from where they lie in the archive."""
    padded = replace(SQUARE, vocab_size=128)
    weights = {f"model.{name}": tensor for name, tensor in random_weights(padded).items()}
    torch.save(weights, tmp_path / "model_weights.ckpt")
    said = sources.nemo1_config(SQUARE, override_vocab_size=None)
    (tmp_path / "model_config.yaml").write_text(yaml.safe_dump(said))
    with tarfile.open(tmp_path / "model.nemo", "w:") as tar:
        for name in ("model_config.yaml", "model_weights.ckpt"):
            tar.add(tmp_path / name, arcname=f"./{name}")
    imported = run_import(tmp_path / "model.nemo", tmp_path / "out", vocab_size=SQUARE.vocab_size)
    assert replace(ModelConfig.load(imported / "checkpoint"), hf={}) == SQUARE
    for name, tensor in read_weights(imported).items():
        assert torch.equal(tensor, weights[f"model.{name}"][: tensor.shape[0]]), name


@pytest.mark.parametrize("config", [tiny.MIXTRAL, TIED, tiny.GPT2, tiny.QWEN3])
def test_families(ranks: WorkerPool, tmp_path: Path, config: ModelConfig) -> None:
    write_result(tmp_path / "ours", config, 0)
    args = {"args": sources.megatron_args(config)}
    targets = {
        str(tmp_path / "lm" / "release"): ("", {}, args),
        str(tmp_path / "bridge"): ("", NON_HOMOGENEOUS, {}),
    }
    checkpoint = str(tmp_path / "ours" / "checkpoint")
    ranks.run(1, save_as, config, layout(), checkpoint, targets)
    (tmp_path / "lm" / "latest_checkpointed_iteration.txt").write_text("release\n")
    sources.write_bridge(tmp_path / "bridge", config)
    compare(run_import(tmp_path / "lm", tmp_path / "from_lm"), config)
    compare(run_import(tmp_path / "bridge", tmp_path / "from_bridge"), config)


def test_own_archives(ranks: WorkerPool, home: Path, tmp_path: Path) -> None:
    """Saved at one layout, restored at another, saved again and imported."""
    result = shutil.copytree(home / "llama", tmp_path / "llama")
    sources.write_tokenizer(result / "checkpoint" / "tokenizer", LLAMA.vocab_size)
    checkpoint = str(result / "checkpoint")
    archive = tmp_path / "model.nemo"
    ranks.run(2, save_nemo, str(result), str(archive), layout(tp=2))
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(RuntimeError, match="Not a directory"):
        ranks.run(2, save_nemo, str(result), str(archive / "no.nemo"), layout(tp=2))
    for size, parallel in ((1, layout()), (2, layout(pp=2))):
        found = ranks.run(size, restore_nemo, str(archive), parallel)
        wanted = ranks.run(size, local_weights, LLAMA, parallel, checkpoint)
        for (weights, config, said), want in zip(found, wanted, strict=True):
            assert weights.keys() == want.keys()
            assert all(torch.equal(weights[name], want[name]) for name in want)
            assert config == LLAMA
            assert said["parallel"]["tensor_model_parallel_size"] == 2
    imported = run_import(tmp_path / "model.nemo.again.nemo", tmp_path / "out")
    compare(imported, LLAMA)
    ours = (Path(checkpoint) / "tokenizer" / "tokenizer.json").read_bytes()
    assert (imported / "checkpoint" / "tokenizer" / "tokenizer.json").read_bytes() == ours


def test_an_archive_reads_nothing_of_the_environment(ranks: WorkerPool, tmp_path: Path) -> None:
    text = yaml.safe_dump({"gpt": {"hidden_size": "${oc.env:HOME}"}})
    (tmp_path / "model_config.yaml").write_text(text)
    with tarfile.open(tmp_path / "model.nemo", "w:") as tar:
        tar.add(tmp_path / "model_config.yaml", arcname="./model_config.yaml")
    with pytest.raises(RuntimeError, match=r"model_config.yaml must hold values, but it refers"):
        ranks.run(1, nemo_config, str(tmp_path / "model.nemo"))

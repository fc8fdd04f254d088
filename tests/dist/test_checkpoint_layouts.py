"""Megatron reads what we write, and we read what Megatron writes, at any layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from tests.cases.checkpoint import load_and_save, load_as_others, save_as
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import GPT2, LLAMA, MIXTRAL, random_weights, write_weights

TIED = replace(LLAMA, share_embeddings_and_output_weights=True)


def layout(tp: int = 1, pp: int = 1, vpp: int | None = None, sp: bool = False) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
    )


@pytest.mark.parametrize(
    ("ranks_used", "parallel", "config"),
    [
        (1, layout(), LLAMA),
        (2, layout(tp=2, sp=True), TIED),
        (2, layout(pp=2, vpp=2), LLAMA),
        (4, layout(tp=2, pp=2), TIED),
        (4, layout(tp=4), LLAMA),
        (2, layout(), LLAMA),  # data parallel
    ],
)
def test_megatron_reads_and_writes_the_same_weights(
    ranks: WorkerPool, tmp_path, monkeypatch, ranks_used, parallel, config
):
    monkeypatch.setattr(
        "nemo_minitron.checkpoint.lazy.BLOCK_BYTES", 20_000
    )  # of the embedding's 25,856
    family, weights = family_of(config), random_weights(config)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    store = {name: from_tensor(tensor) for name, tensor in weights.items()}
    write_torch_dist(ours, store, family, config, workers=2)
    local = ranks.run(ranks_used, load_and_save, config, parallel, str(ours), str(theirs))
    # the shards of the first pipeline stage, against slices made by hand
    tp = parallel.tensor_model_parallel_size
    for rank in range(tp):
        qkv = weights["decoder.layers.0.self_attention.linear_qkv.weight"].chunk(tp)[rank]
        gate, up = weights["decoder.layers.0.mlp.linear_fc1.weight"].chunk(2)
        fc1 = torch.cat([gate.chunk(tp)[rank], up.chunk(tp)[rank]])
        fc2 = weights["decoder.layers.0.mlp.linear_fc2.weight"].chunk(tp, dim=1)[rank]
        norm = weights["decoder.layers.0.input_layernorm.weight"]
        layer = "decoder.layers.0."
        assert torch.equal(local[rank][layer + "self_attention.linear_qkv.weight"], qkv)
        assert torch.equal(local[rank][layer + "mlp.linear_fc1.weight"], fc1)
        assert torch.equal(local[rank][layer + "mlp.linear_fc2.weight"], fc2)
        assert torch.equal(local[rank][layer + "input_layernorm.weight"], norm)
    back = read_torch_dist(theirs, family, config)
    assert set(back) == set(weights)
    for name, tensor in weights.items():
        assert torch.equal(back[name].read(), tensor), name


def sizes(folder: Path) -> dict[str, torch.Size]:
    """Global sizes of all tensors in a checkpoint, as they lie on disk."""
    saved = FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        k: tensor.size for k, tensor in saved.items() if isinstance(tensor, TensorStorageMetadata)
    }


@pytest.mark.parametrize(
    ("parallel", "config"),
    [(layout(pp=2), LLAMA), (layout(tp=2, sp=True), MIXTRAL), (layout(), GPT2)],
)
def test_others_load_results_without_extra_flags(ranks: WorkerPool, tmp_path, parallel, config):
    """``_extra_state`` objects are there, from a streaming stage as from training."""
    write_weights(tmp_path / "ours", config, 0)
    (tmp_path / "trained").mkdir()
    folders = (str(tmp_path / "ours"), str(tmp_path / "trained"))
    weights = random_weights(config)
    found = ranks.run(2, load_as_others, config, parallel, *folders)
    # Of no layout: the vocabulary of 101 is padded to 102 in memory at TP2.
    assert sizes(tmp_path / "ours") == sizes(tmp_path / "trained")
    # Releases before 0.19 want it, later ones no longer write it.
    assert all((tmp_path / name / "common.pt").is_file() for name in ("ours", "trained"))
    for streamed, trained in found:
        assert streamed[1] == trained[1]
        assert any(key.endswith("linear_qkv._extra_state") for key in streamed[1])
        assert streamed[2] == trained[2] == config.num_layers
        assert all(torch.equal(streamed[0][name], value) for name, value in trained[0].items())
        last_stage = config is LLAMA and "output_layer.weight" in streamed[0]
        norm = "decoder.layers.{}.input_layernorm.weight"
        wanted = weights[norm.format(2 if last_stage else 0)]
        assert torch.equal(streamed[0][norm.format(0)], wanted)


def test_a_weight_that_is_not_finite_is_named_as_in_the_whole_model(ranks: WorkerPool, tmp_path):
    """Its layer is the first of the second pipeline stage."""
    weights, name = random_weights(LLAMA), "decoder.layers.2.mlp.linear_fc1.weight"
    weights[name][3, 5] = float("nan")
    store = {key: from_tensor(tensor) for key, tensor in weights.items()}
    write_torch_dist(tmp_path, store, family_of(LLAMA), LLAMA, workers=1)
    with pytest.raises(RuntimeError, match=rf"{name} in .* holds NaN or infinite values"):
        ranks.run(2, load_and_save, LLAMA, layout(pp=2), str(tmp_path), str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("written", "trained", "parallel"),
    [("float32", "bfloat16", layout(tp=2)), ("bfloat16", "float32", layout(pp=2))],
)
def test_the_dtype_is_that_of_what_was_trained(
    ranks: WorkerPool, tmp_path, written, trained, parallel
):
    """``model.yaml`` names the dtype in memory; other files of the folder stay."""
    config, weights = replace(LLAMA, dtype=written), random_weights(LLAMA, seed=0)
    write_weights(tmp_path / "source", LLAMA, 0)
    folder, dtype = tmp_path / "out", getattr(torch, trained)
    folder.mkdir()
    (folder / "lineage.json").write_text("{}")
    ranks.run(2, save_as, dtype, config, parallel, str(tmp_path / "source"), str(folder))
    assert ModelConfig.load(folder) == replace(LLAMA, dtype=trained)
    back = read_torch_dist(folder, family_of(LLAMA), LLAMA)
    assert all(torch.equal(back[name].read(), weights[name].to(dtype)) for name in weights)
    assert (folder / "lineage.json").is_file()

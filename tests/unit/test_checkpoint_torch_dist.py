import pickle
import shutil
import sys
import threading
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from nemo_minitron.checkpoint import torch_dist, torch_dist_rows
from nemo_minitron.checkpoint.common_state import COMMON_KEY
from nemo_minitron.checkpoint.lazy import LazyTensor, from_tensor
from nemo_minitron.checkpoint.page_cache import create
from nemo_minitron.checkpoint.refuse_code import refuse_code
from nemo_minitron.checkpoint.torch_dist import (
    _LazySavePlanner,
    disk_key,
    read_torch_dist,
    write_torch_dist,
)
from nemo_minitron.checkpoint.torch_dist_read import METADATA
from nemo_minitron.families.registry import family_of
from tests.helpers.tiny import LLAMA, random_weights

FAMILY = family_of(LLAMA)


def lazy(weights):
    return {name: from_tensor(tensor) for name, tensor in weights.items()}


def write(folder: Path, weights, config=LLAMA, workers=2) -> Path:
    folder.mkdir(exist_ok=True)
    write_torch_dist(folder, lazy(weights), FAMILY, config, workers=workers)
    return folder


def assert_same(store, weights):
    assert set(store) == set(weights)
    for name, tensor in weights.items():
        assert store[name].shape == tuple(tensor.shape)
        assert store[name].dtype == tensor.dtype
        assert torch.equal(store[name].read(), tensor), name
        first, last = len(tensor) // 3, len(tensor) - len(tensor) // 4
        assert torch.equal(store[name].read_rows(first, last), tensor[first:last]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("workers", [1, 3])
def test_round_trip_is_exact(tmp_path, dtype, workers):
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(LLAMA).items()}
    folder = write(tmp_path / "checkpoint", weights, workers=workers)
    assert_same(read_torch_dist(folder, FAMILY, LLAMA), weights)


def test_equal_weights_give_equal_files(tmp_path):
    one = write(tmp_path / "one", random_weights(LLAMA), workers=1)
    two = write(tmp_path / "two", random_weights(LLAMA), workers=3)
    assert {p.name: p.read_bytes() for p in one.iterdir()} == {
        p.name: p.read_bytes() for p in two.iterdir()
    }


def test_layout_on_disk_is_megatrons(tmp_path):
    folder = write(tmp_path / "checkpoint", random_weights(LLAMA))
    metadata = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
    fc1 = metadata["decoder.layers.mlp.linear_fc1.weight"]
    assert tuple(fc1.size) == (4, 192, 64)
    assert [tuple(chunk.offsets) for chunk in fc1.chunks] == [(i, 0, 0) for i in range(4)]
    assert tuple(metadata["embedding.word_embeddings.weight"].size) == (101, 64)
    objects = {key for key, saved in metadata.items() if isinstance(saved, BytesStorageMetadata)}
    assert set(metadata) - objects == {disk_key(row) for row in FAMILY.rows}
    assert "decoder.layers.self_attention.core_attention._extra_state/shard_3_4" in objects
    assert {key for key in objects if "/shard_0_1" in key} == {
        "decoder.final_layernorm._extra_state/shard_0_1",
        "common_state/shard_0_1",
    }
    assert len(objects) == 2 + 4 * 5
    assert "decoder.layers.self_attention.linear_qkv.layer_norm_weight" in metadata


def test_writing_is_lazy(tmp_path):
    """Every tensor is read once, and few are alive at a time."""
    weights, lock = random_weights(replace(LLAMA, num_layers=12)), threading.Lock()
    config = replace(LLAMA, num_layers=12)
    reads, most = [], 0
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def reader(name):
        def read():
            nonlocal most
            value = weights[name].clone()
            with lock:
                reads.append(name)
                alive.add(value)
                most = max(most, len(alive))
            return value

        return read

    store = {
        name: LazyTensor(tuple(tensor.shape), tensor.dtype, reader(name))
        for name, tensor in weights.items()
    }
    workers = 2
    write_torch_dist(tmp_path, store, FAMILY, config, workers=workers)
    assert sorted(reads) == sorted(weights)
    assert most <= 3 * workers < len(weights) / 10


def test_files_are_cut_at_a_size(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_dist, "_MAX_FILE_BYTES", 100_000)
    weights = random_weights(LLAMA)
    folder = write(tmp_path / "checkpoint", weights)
    assert max(p.stat().st_size for p in folder.glob("*.distcp")) < 110_000
    assert_same(read_torch_dist(folder, FAMILY, LLAMA), weights)


def test_large_tensors_are_written_in_blocks_of_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("nemo_minitron.checkpoint.lazy.BLOCK_BYTES", 5_000)
    weights = random_weights(LLAMA)
    folder = write(tmp_path / "checkpoint", weights)
    metadata = pickle.loads((folder / ".metadata").read_bytes()).state_dict_metadata
    chunks = metadata["embedding.word_embeddings.weight"].chunks
    assert [tuple(chunk.offsets) for chunk in chunks] == [(i, 0) for i in range(0, 101, 19)]
    assert [chunk.sizes[0] for chunk in chunks] == [19] * 5 + [6]
    assert_same(read_torch_dist(folder, FAMILY, LLAMA), weights)


def test_rows_are_read_without_the_rest(tmp_path, monkeypatch):
    folder = write(tmp_path / "checkpoint", random_weights(LLAMA))
    store, read = read_torch_dist(folder, FAMILY, LLAMA), []
    original = torch_dist_rows.read_into

    def counting(path, offset, target):
        read.append(target.nbytes)
        original(path, offset, target)

    monkeypatch.setattr(torch_dist_rows, "read_into", counting)
    read_rows(store["decoder.layers.2.mlp.linear_fc1.weight"], 5, 9)
    assert read == [4 * 64 * 4]


def save_in_chunks(folder: Path, tensors: dict, cuts: dict, extra: dict | None = None) -> None:
    """What Megatron would leave: tensors cut along some dims, over several files."""
    items, reads = [], {}
    for key, tensor in {**tensors, **(extra or {})}.items():
        blocks = [((0,) * tensor.dim(), tensor)]
        for dim, size in cuts.get(key, []):
            blocks = [
                ((*offsets[:dim], offsets[dim] + i * size, *offsets[dim + 1 :]), part)
                for offsets, block in blocks
                for i, part in enumerate(block.split(size, dim))
            ]
        for offsets, block in blocks:
            index = MetadataIndex(key, offsets)
            chunk = ChunkStorageMetadata(torch.Size(offsets), block.shape)
            data = TensorWriteData(chunk, TensorProperties(tensor.dtype), tensor.shape)
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            reads[index] = block.contiguous
    folder.mkdir()
    writer, planner = FileSystemWriter(folder), _LazySavePlanner(reads)
    plans = [SavePlan(items[i::3]) for i in range(3)]
    plans, metadata = create_default_global_save_plan(plans)
    plans = writer.prepare_global_plan(plans)
    writer.finish(metadata, [writer.write_data(plan, planner).wait() for plan in plans])
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


def read_rows(tensor: LazyTensor, start: int, stop: int) -> torch.Tensor:
    assert tensor.read_rows is not None
    return tensor.read_rows(start, stop)


def stacked(weights, config):
    """Megatron's homogeneous tensors."""
    result: dict[str, list[torch.Tensor]] = {}
    for name, row, layer in FAMILY.parameters(config):
        result.setdefault(disk_key(row), []).append(weights[name])
    return {
        key: torch.stack(parts) if ".layers." in key else parts[0] for key, parts in result.items()
    }


def test_reads_chunks_cut_anyhow_and_a_padded_vocabulary(tmp_path):
    weights = random_weights(LLAMA)
    whole = stacked(weights, LLAMA)
    cuts = {}
    for row in FAMILY.rows:
        key, lead = disk_key(row), 1 if row.per_layer else 0
        cuts[key] = [(0, 3)] if row.per_layer else []  # chunks of 3 layers out of 4
        if row.tp_dim is not None:
            cuts[key].append((row.tp_dim + lead, 17))  # not a divisor of anything
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        pad = torch.full((27, 64), float("nan"))
        whole[key] = torch.cat([whole[key], pad])
    extra = {"optimizer.state.exp_avg.decoder.layers.mlp.linear_fc1.weight": torch.zeros(3)}
    save_in_chunks(tmp_path / "checkpoint", whole, cuts, extra)
    assert_same(read_torch_dist(tmp_path / "checkpoint", FAMILY, LLAMA), weights)


def test_reads_a_key_per_layer_under_local_names(tmp_path):
    weights = random_weights(LLAMA)
    save_in_chunks(tmp_path / "checkpoint", weights, {})
    assert_same(read_torch_dist(tmp_path / "checkpoint", FAMILY, LLAMA), weights)


def test_a_gap_between_chunks_is_found(tmp_path):
    whole = stacked(random_weights(LLAMA), LLAMA)
    folder = tmp_path / "checkpoint"
    save_in_chunks(folder, whole, {"decoder.layers.mlp.linear_fc1.weight": [(0, 1)]})
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    saved = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"]
    saved.chunks = [chunk for chunk in saved.chunks if chunk.offsets[0] != 2]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    store = read_torch_dist(folder, FAMILY, LLAMA)
    store["decoder.layers.1.mlp.linear_fc1.weight"].read()
    with pytest.raises(
        ValueError, match=r"linear_fc1.weight at \(2, 0, 0\) has 0 of 12288 elements"
    ):
        store["decoder.layers.2.mlp.linear_fc1.weight"].read()
    with pytest.raises(ValueError, match=r"has 0 of 12288 elements"):
        read_rows(store["decoder.layers.2.mlp.linear_fc1.weight"], 0, 2)


def test_another_byte_order_in_settings(tmp_path, monkeypatch):
    """torch ends the process when it looks at the tensors of such a file without reading them."""
    folder = write(tmp_path / "checkpoint", random_weights(LLAMA))
    with monkeypatch.context() as patch:
        patch.setattr("sys.byteorder", {"little": "big", "big": "little"}[sys.byteorder])
        torch.save({"step": torch.ones(3)}, folder / "common.pt")
    with pytest.raises(ValueError, match=r"common\.pt is damaged, or .*this machine's byte order"):
        refuse_code(folder)


def test_compressed_settings(tmp_path):
    """A hundred kilobytes of them could stand for a hundred megabytes."""
    folder = write(tmp_path / "checkpoint", random_weights(LLAMA))
    with zipfile.ZipFile(folder / "common.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(folder / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"common\.pt is damaged, or .* is compressed"):
        refuse_code(folder)


def test_another_byte_order(tmp_path, monkeypatch):
    """Rows are then read as torch reads the whole, which turns the bytes."""
    weights = random_weights(LLAMA)
    with monkeypatch.context() as patch:
        patch.setattr("sys.byteorder", {"little": "big", "big": "little"}[sys.byteorder])
        folder = write(tmp_path / "checkpoint", weights)
    turned = {name: torch.from_numpy(tensor.numpy().byteswap()) for name, tensor in weights.items()}
    store = read_torch_dist(folder, FAMILY, LLAMA)
    for name, tensor in turned.items():
        assert torch.equal(store[name].read().view(torch.int32), tensor.view(torch.int32)), name
        rows = read_rows(store[name], 1, 3)
        assert torch.equal(rows.view(torch.int32), tensor[1:3].view(torch.int32)), name


def test_store_that_does_not_fit_is_refused(tmp_path):
    weights = random_weights(LLAMA)
    fewer = {name: tensor for name, tensor in weights.items() if "layers.2.mlp" not in name}
    with pytest.raises(ValueError, match=r"missing .*layers.2.mlp.linear_fc1.weight"):
        write(tmp_path, fewer)
    with pytest.raises(ValueError, match=r"unexpected .*'x.weight'"):
        write(tmp_path, {**weights, "x.weight": torch.zeros(1)})
    with pytest.raises(
        ValueError, match=r"final_layernorm.weight has shape \(3,\).*asks for \(64,\)"
    ):
        write(tmp_path, {**weights, "decoder.final_layernorm.weight": torch.zeros(3)})
    mixed = {**weights}
    mixed["decoder.layers.2.mlp.linear_fc1.weight"] = torch.zeros(192, 64).half()
    with pytest.raises(ValueError, match=r"is torch.float16 but its first layer is torch.float32"):
        write(tmp_path, mixed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 3}, r"of shape \(4, .*asks for .* in 3 layers"),
        ({"ffn_hidden_size": 100}, r"linear_fc1.weight of shape \(4, 192, 64\).*\(200, 64\)"),
        ({"vocab_size": 102}, r"word_embeddings.weight of shape \(101, 64\).*\(102, 64\)"),
        ({"share_embeddings_and_output_weights": True}, "output_layer.weight, which this model"),
    ],
)
def test_config_that_does_not_fit_is_refused(tmp_path, change, message):
    folder = write(tmp_path / "checkpoint", random_weights(LLAMA))
    with pytest.raises(ValueError, match=message):
        read_torch_dist(folder, FAMILY, replace(LLAMA, **change))


def test_missing_parameter_is_named(tmp_path):
    whole = stacked(random_weights(LLAMA), LLAMA)
    del whole["decoder.final_layernorm.weight"]
    save_in_chunks(tmp_path / "checkpoint", whole, {})
    with pytest.raises(ValueError, match=r"lacks decoder\.final_layernorm\.weight"):
        read_torch_dist(tmp_path / "checkpoint", FAMILY, LLAMA)


def test_damaged_files_are_named(tmp_path):
    good = write(tmp_path / "good", random_weights(LLAMA))

    def damaged(name, content):
        folder = tmp_path / "bad"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        return folder

    data = (good / "__0_0.distcp").read_bytes()
    cases = [
        ("__0_0.distcp", data[:-100], "__0_0.distcp is truncated"),
        ("__0_0.distcp", None, "__0_0.distcp is missing"),
        (".metadata", None, ".metadata is missing or damaged"),
        (".metadata", (good / ".metadata").read_bytes()[:-50], ".metadata is missing or damaged"),
        ("metadata.json", None, "is not a Megatron checkpoint: metadata.json is missing"),
        ("metadata.json", b"{", "metadata.json is damaged"),
        ("metadata.json", b'{"sharded_backend": "zarr"}', "sharded_backend=zarr"),
    ]
    for name, content, message in cases:
        with pytest.raises(ValueError, match=message):
            read_torch_dist(damaged(name, content), FAMILY, LLAMA)
    store = read_torch_dist(damaged("__0_0.distcp", bytes(len(data))), FAMILY, LLAMA)
    with pytest.raises(ValueError, match=r"__0_0.distcp is damaged at decoder.*linear_qkv.weight"):
        store["decoder.layers.0.self_attention.linear_qkv.weight"].read()


def rewrite_metadata(folder: Path, change) -> None:
    """Change where the pieces lie; ``change`` takes and returns ``storage_data``."""
    path = folder / METADATA
    metadata = pickle.loads(path.read_bytes())
    metadata.storage_data = change(metadata.storage_data)
    path.write_bytes(pickle.dumps(metadata))


def test_files_in_several_folders(tmp_path):
    """Of one name, even: each is read where it lies."""
    weights = random_weights(LLAMA)
    folder = write(tmp_path / "checkpoint", weights)

    def spread(storage):
        for file in {info.relative_path for info in storage.values()}:
            (folder / file).rename(folder / "moved")
            (folder / file).mkdir()
            (folder / "moved").rename(folder / file / "x")
        return {
            index: replace(info, relative_path=f"{info.relative_path}/x")
            for index, info in storage.items()
        }

    rewrite_metadata(folder, spread)
    store = read_torch_dist(folder, FAMILY, LLAMA)
    assert all(torch.equal(store[name].read(), value) for name, value in weights.items())


def test_an_object_in_place_of_a_tensor(tmp_path):
    folder = write(tmp_path / "checkpoint", random_weights(LLAMA))
    norm = "decoder.final_layernorm.weight"

    def swap(storage):
        (other,) = (info for index, info in storage.items() if index.fqn == COMMON_KEY)
        return {index: other if index.fqn == norm else info for index, info in storage.items()}

    rewrite_metadata(folder, swap)
    with pytest.raises(ValueError, match=rf"distcp is damaged at {norm}"):
        read_torch_dist(folder, FAMILY, LLAMA)[norm].read()


def test_full_disk_is_an_os_error(tmp_path, monkeypatch):
    import errno

    def full(path):
        return create("/dev/full")

    monkeypatch.setattr("nemo_minitron.checkpoint.torch_dist.create", full)
    with pytest.raises(OSError, match=r"No space left") as error:
        write(tmp_path / "checkpoint", random_weights(LLAMA))
    assert error.value.errno == errno.ENOSPC

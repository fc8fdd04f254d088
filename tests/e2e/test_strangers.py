"""Results and models of somebody else: nothing in them runs, or opens a file of this machine."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from nemo_minitron.checkpoint.common_state import COMMON_KEY
from nemo_minitron.checkpoint.parts import Part
from nemo_minitron.checkpoint.safe_pickle import read_metadata
from tests.helpers.bad_input import build, done, edited, line, resized, run_line
from tests.helpers.data_fixtures import EOS


class Evil:
    """An object that creates a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def metadata_of(folder: Path) -> Any:
    path = folder / ".metadata"
    return read_metadata(Part(path, 0, path.stat().st_size), strict=True)


def in_metadata(folder: Path, evil: Evil) -> None:
    """Put the object among the planner's settings, as Megatron's own pickle has them."""
    metadata = metadata_of(folder)
    metadata.planner_data = evil
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def in_common(folder: Path, evil: Evil) -> None:
    """In the file of megatron-core before 0.19."""
    common = torch.load(folder / "common.pt", weights_only=False)
    torch.save({**common, "evil": evil}, folder / "common.pt")


def in_object(folder: Path, evil: Evil) -> None:
    """In the object of megatron-core 0.19 and later."""
    torch.save([{"evil": evil}], folder / "__99_0.distcp")
    (folder / "common.pt").unlink()
    metadata = metadata_of(folder)
    metadata.state_dict_metadata[COMMON_KEY] = BytesStorageMetadata()
    size = (folder / "__99_0.distcp").stat().st_size
    info = _StorageInfo("__99_0.distcp", 0, size)
    metadata.storage_data[MetadataIndex(COMMON_KEY)] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def says(place: str) -> str:
    """Return the text that the error must contain."""
    words = {"metadata": ".mkdir, which no checkpoint needs", "common": "common.pt is damaged, or"}
    return words.get(place, f"{COMMON_KEY} in ")


PLACES: dict[str, Callable[[Path, Evil], None]] = {
    "metadata": in_metadata,
    "common": in_common,
    "object": in_object,
}


def put_in(place: Callable[[Path, Evil], None], evil: Evil) -> Callable[[Path], None]:
    """An edit of a checkpoint."""
    return lambda folder: place(folder, evil)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good inputs, and results in which there is code: evil-metadata, evil-common, evil-object."""
    home = tmp_path_factory.mktemp("home")
    build(home)
    tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (home / "hf" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    done(run_line(line("import", home, home / "model", overwrite="true")))
    (home / "prompts.txt").write_text("one two\n")
    for name, place in PLACES.items():
        evil = Evil(home / "marker")
        edited(home / "model", home / f"evil-{name}", put_in(place, evil))
    return home


@pytest.mark.parametrize(
    ("stage", "key", "place"),
    [
        ("importance", "checkpoint", "metadata"),
        ("prune", "checkpoint", "metadata"),
        ("prune", "checkpoint", "object"),
        ("search", "checkpoint", "metadata"),
        ("teacher_logits", "checkpoint", "metadata"),
        ("distill", "student", "metadata"),
        ("distill", "teacher", "object"),
        ("finetune", "checkpoint", "metadata"),
        ("evaluate", "checkpoint", "metadata"),
        ("evaluate", "checkpoint", "common"),
        ("evaluate", "checkpoint", "object"),
        ("generate", "checkpoint", "metadata"),
        ("benchmark", "checkpoint", "metadata"),
        ("export", "checkpoint", "metadata"),
        ("export", "checkpoint", "common"),
    ],
)
def test_code_in_a_result(home, tmp_path, stage, key, place):
    """Stages that read tensors by themselves pass it over, those that use Megatron refuse it."""
    ending = run_line(line(stage, home, tmp_path / "out", **{key: home / f"evil-{place}"}))
    assert not (home / "marker").exists()
    assert "Traceback" not in ending.err
    if stage in ("prune", "export"):
        done(ending)
    else:
        assert ending.code == 2, ending.err
        assert says(place) in ending.err
        assert not (tmp_path / "out").exists()


def _other_format(folder: Path) -> None:
    (folder / "metadata.json").write_text('{"another": "torch_dist"}')


@pytest.mark.parametrize("stage", ["evaluate", "generate", "teacher_logits"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (resized(ffn_hidden_size=64), "weights are not those of its model.yaml: decoder.layers.ml"),
        (resized(num_layers=3), "weights are not those of its model.yaml: "),
        (_other_format, "metadata.json: sharded_backend=None, not torch_dist"),
    ],
)
def test_a_checkpoint_that_contradicts_itself(home, tmp_path, stage, edit, words):
    """Its manifest is right, as whoever edited it can write one."""
    model = edited(home / "model", tmp_path / "model", edit)
    ending = run_line(line(stage, home, tmp_path / "out", checkpoint=model))
    assert ending.code == 2, ending.err
    assert words in ending.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", PLACES)
def test_code_in_a_checkpoint_to_import(home, tmp_path, place):
    source = shutil.copytree(home / f"evil-{place}" / "checkpoint", tmp_path / "iter_0000001")
    (source / "model.yaml").unlink()
    ending = run_line(["import", f"source={source}", f"output_dir={tmp_path / 'out'}"])
    assert ending.code in (0, 2), ending.err
    assert not (home / "marker").exists()


@pytest.mark.parametrize("place", [None, *PLACES])
def test_code_in_unfinished_training(home, tmp_path, place, monkeypatch):
    """The folder of a stopped training, from somebody else, that the same command goes on from."""
    from nemo_minitron.models import training
    from nemo_minitron.runtime.errors import Preempted

    keys = {"trainer.max_steps": 2, "trainer.save_every_n_steps": 1}
    command = line("finetune", home, tmp_path / "out", **keys)
    with monkeypatch.context() as patch:
        patch.setattr(training.History, "on_train_batch_end", stop_after_first(Preempted))
        assert run_line(command).code == 75
    saved = tmp_path / "out.partial" / "checkpoints" / "step=1"
    if place is None:  # without code it goes on
        return done(run_line(command))
    shutil.rmtree(saved.parent.with_name(f"{saved.parent.name}.sums"))  # hashes of what was written
    PLACES[place](saved, Evil(home / "marker"))
    ending = run_line(command)
    assert not (home / "marker").exists()
    assert ending.code == 2, ending.err
    assert says(place) in ending.err


def stop_after_first(error: type[BaseException]) -> Callable[..., None]:
    """A hook that saves the first step and stops."""

    def hook(self: Any, trainer: Any, *args: Any) -> None:
        trainer.save_checkpoint(Path(str(trainer.checkpoint_callback.dirpath)) / "step=1")
        raise error("stopped by the test")

    return hook

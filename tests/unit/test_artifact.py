"""Result folders: complete or absent, never in between."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_minitron.checkpoint import artifact
from nemo_minitron.checkpoint.artifact import Ranks, check_output, open_result, output_folder
from nemo_minitron.checkpoint.manifest import (
    Manifest,
    config_hash,
    digest,
    fingerprint,
    read_manifest,
)
from nemo_minitron.config.stages import STAGE_CONFIGS, ExportConfig, PruneConfig, PruningConfig


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "model").write_text("weights")
    return folder


@pytest.fixture
def cfg(tmp_path, source):
    return ExportConfig(output_dir=str(tmp_path / "deep/out"), checkpoint=str(source))


def write(cfg, text="new", **options):
    with output_folder(cfg, "export", **options) as folder:
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub/file").write_text(text)
        (folder / "metrics.json").write_text("{}")
    return Path(cfg.output_dir)


def manifest_of(folder: Path) -> Manifest:
    manifest = read_manifest(folder)
    assert manifest is not None
    return manifest


def fail(cfg, error, **options):
    with output_folder(cfg, "export", **options) as folder:
        (folder / "step").write_text("7")
        raise error


def siblings(cfg):
    return sorted(path.name for path in Path(cfg.output_dir).parent.iterdir())


def test_complete_result(cfg, source):
    folder = write(cfg)
    manifest = open_result(folder)
    assert set(manifest.files) == {"sub/file", "metrics.json", ".hydra/config.yaml"}
    assert manifest.stage == "export"
    assert manifest.config_hash == config_hash(cfg)
    assert manifest.inputs == {"checkpoint": fingerprint(source)}
    assert manifest.versions["nemo_minitron"]
    assert json.loads((folder / "manifest.json").read_text())["complete"] is True
    assert siblings(cfg) == ["out"]


def test_existing_result_needs_overwrite(cfg):
    write(cfg)
    for call in (lambda: check_output(cfg, "export"), lambda: write(cfg)):
        with pytest.raises(
            ValueError,
            match="already holds a complete result; set overwrite=true or another output_dir",
        ):
            call()
    cfg.overwrite = True
    check_output(cfg, "export")
    assert (write(cfg, "newer") / "sub/file").read_text() == "newer"
    assert siblings(cfg) == ["out"]


def test_what_is_no_result_is_never_replaced(cfg):
    cfg.overwrite = True
    Path(cfg.output_dir).mkdir(parents=True)
    check_output(cfg, "export")  # empty: fine
    (Path(cfg.output_dir) / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="is not a result"):
        write(cfg)


def test_a_result_of_another_stage_is_not_replaced(cfg, source, tmp_path):
    write(cfg)
    prune = PruneConfig(output_dir=cfg.output_dir, checkpoint=str(source), overwrite=True)
    with pytest.raises(ValueError, match="holds a result of stage 'export'"):
        check_output(prune, "prune")


@pytest.mark.parametrize("output", ["source", ""])
def test_an_output_never_replaces_its_input(source, output):
    cfg = ExportConfig(output_dir=str(source.parent / output), checkpoint=str(source))
    with pytest.raises(ValueError, match="would replace its own input checkpoint="):
        check_output(cfg, "export")


def test_a_damaged_result_can_be_overwritten(cfg):
    manifest = write(cfg) / "manifest.json"
    manifest.write_text(manifest.read_text()[:-30])
    with pytest.raises(ValueError, match="damaged"):
        check_output(cfg, "export")
    cfg.overwrite = True
    assert open_result(write(cfg))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(143)])
def test_failure_leaves_the_old_result_and_no_rest(cfg, error, overwrite):
    if overwrite:
        write(cfg, "old")
        cfg.overwrite = True
    with pytest.raises(type(error)):
        fail(cfg, error)
    assert siblings(cfg) == (["out"] if overwrite else [])
    if overwrite:
        assert (Path(cfg.output_dir) / "sub/file").read_text() == "old"
        open_result(cfg.output_dir)


class _FullDisk:
    """``open`` of a full disk: writing files whose name contains ``name`` fails."""

    def __init__(self, name):
        self.name, self.open = name, open

    def __call__(self, file, *arguments, **options):
        if self.name in str(file) and "w" in "".join(map(str, arguments)):
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return self.open(file, *arguments, **options)


def test_disk_full_while_the_manifest_is_written(cfg, monkeypatch, caplog):
    write(cfg, "old")
    cfg.overwrite = True
    monkeypatch.setattr("builtins.open", _FullDisk("manifest.json"))
    with pytest.raises(OSError, match="No space left"):
        write(cfg)
    assert "still stands" in caplog.text
    monkeypatch.undo()
    assert (Path(cfg.output_dir) / "sub/file").read_text() == "old"
    open_result(cfg.output_dir)
    assert siblings(cfg) == ["out"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_disk_full_for_real(tmp_path, source):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        cfg = ExportConfig(output_dir=str(disk / "out"), checkpoint=str(source))
        write(cfg, "old" * 1000)
        cfg.overwrite = True
        with pytest.raises(OSError, match="No space left"):
            write(cfg, "new" * 100000)
        assert (disk / "out/sub/file").read_text() == "old" * 1000
        open_result(cfg.output_dir)
        assert sorted(os.listdir(disk)) == ["out"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_killed_between_the_two_renames(cfg):
    """The old result is put back; what an earlier version left is put in its place."""
    folder = write(cfg, "old")
    (folder / "replaced.json").touch()
    folder.rename(artifact.old_of(folder))
    with pytest.raises(ValueError, match="already holds a complete result"):
        write(cfg)
    assert (folder / "sub/file").read_text() == "old"
    open_result(folder)
    assert siblings(cfg) == ["out"]


def test_killed_between_the_two_renames_by_an_earlier_version(cfg):
    """It left both results complete, and no file that says who moved them."""
    old = write(cfg, "old").rename(f"{cfg.output_dir}.old")
    shutil.copytree(old, f"{cfg.output_dir}.partial")
    (Path(f"{cfg.output_dir}.partial") / "later").write_text("new")
    with pytest.raises(ValueError, match="already holds a complete result"):
        write(cfg)
    assert (Path(cfg.output_dir) / "later").read_text() == "new"
    assert read_manifest(old)


KILL = """
import os, signal, sys
from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.config.stages import STAGE_CONFIGS, ExportConfig
cfg = ExportConfig(output_dir=sys.argv[1], checkpoint=sys.argv[2])
with output_folder(cfg, "export", resumable=sys.argv[3] == "resumable") as folder:
    (folder / "step").write_text("7")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def kill(cfg, how):
    done = subprocess.run([sys.executable, "-c", KILL, cfg.output_dir, cfg.checkpoint, how])
    assert done.returncode == -9


def test_work_of_a_killed_job_is_resumed(cfg):
    kill(cfg, "resumable")
    assert siblings(cfg) == ["out.partial"]
    with output_folder(cfg, "export", resumable=True) as folder:
        assert (folder / "step").read_text() == "7"
    assert set(open_result(cfg.output_dir).files) == {"step", ".hydra/config.yaml"}


def test_work_of_a_killed_job_is_cleared_when_not_resumable(cfg):
    kill(cfg, "not")
    with output_folder(cfg, "export") as folder:
        assert not (folder / "step").exists()


def test_work_of_another_config_is_refused_or_cleared(cfg, source):
    kill(cfg, "resumable")
    cfg.max_shard_size = "1GB"
    with pytest.raises(ValueError, match=r"another config \(max_shard_size 5GB -> 1GB\)"):
        write(cfg, resumable=True)
    cfg.max_shard_size = "5GB"
    (source / "model").write_text("other weights")
    with pytest.raises(ValueError, match=r"another config .checkpoint sha256:"):
        write(cfg, resumable=True)
    cfg.overwrite = True
    with output_folder(cfg, "export", resumable=True) as folder:
        assert not (folder / "step").exists()


def test_neutral_keys_do_not_stop_a_resume(cfg):
    kill(cfg, "resumable")
    cfg.workers = 7
    with output_folder(cfg, "export", resumable=True) as folder:
        assert (folder / "step").exists()


def test_failure_keeps_resumable_work(cfg):
    with pytest.raises(RuntimeError):
        fail(cfg, RuntimeError(), resumable=True)
    with output_folder(cfg, "export", resumable=True) as folder:
        assert (folder / "step").read_text() == "7"


def test_two_processes_do_not_write_one_result(cfg):
    code = KILL.replace("os.kill(os.getpid(), signal.SIGKILL)", "print(flush=True); input()")
    other = subprocess.Popen(
        [sys.executable, "-c", code, cfg.output_dir, cfg.checkpoint, "not"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ValueError, match=f"is being written by process {other.pid}"):
        write(cfg)
    other.communicate(b"\n")
    assert open_result(cfg.output_dir)


def test_only_rank_0_touches_folders(cfg):
    calls = []
    with output_folder(cfg, "export", ranks=Ranks(1, lambda: calls.append(1))) as folder:
        assert not folder.exists()
    assert len(calls) == 3
    with output_folder(cfg, "export", ranks=Ranks(0, lambda: calls.append(0))) as folder:
        (folder / "file").write_text("x")
    assert len(calls) == 6
    assert open_result(cfg.output_dir)


def test_damage_is_found_and_named(cfg):
    folder = write(cfg, "0123456789")
    file = folder / "sub/file"
    file.write_text("012345678x")
    open_result(folder, "size")
    with pytest.raises(ValueError, match=r"checkpoint=.*sub/file is changed .*overwrite=true"):
        open_result(folder, key="checkpoint")
    file.write_text("0123")
    with pytest.raises(ValueError, match=r"sub/file is truncated \(4 bytes, 10 when"):
        open_result(folder, "size")
    file.unlink()
    with pytest.raises(ValueError, match="sub/file is missing"):
        open_result(folder, "size")


def test_a_manifest_that_was_edited(cfg):
    path = write(cfg) / "manifest.json"
    path.write_text(path.read_text().replace('"size": 3', '"size": 4'))
    with pytest.raises(ValueError, match=r"manifest.json was changed"):
        open_result(cfg.output_dir)


def test_what_is_not_a_result(cfg, tmp_path):
    with pytest.raises(ValueError, match=r"student=.*/none does not exist"):
        open_result(tmp_path / "none", key="student")
    with pytest.raises(ValueError, match=r"not a complete result \(manifest.json is missing\)"):
        open_result(tmp_path)
    folder = write(cfg)
    with pytest.raises(ValueError, match=r"give the result folder .*/out itself"):
        open_result(folder / "sub")
    with pytest.raises(ValueError, match=r"result of stage 'export' without checkpoint/model.yaml"):
        open_result(folder, needs="checkpoint/model.yaml")
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, "complete": False}))
    assert read_manifest(folder) is None


def test_identity_follows_content_config_and_inputs_not_time(cfg, source):
    def identity():
        cfg.overwrite = True
        return manifest_of(write(cfg)).id

    first = identity()
    assert identity() == first
    cfg.workers = 9
    assert identity() == first
    cfg.max_shard_size = "1GB"
    assert identity() != first
    cfg.max_shard_size = "5GB"
    (source / "model").write_text("other")
    assert identity() != first


def test_a_model_card_is_not_part_of_the_identity(cfg):
    """It holds the name of the folder. Results of versions in which it was a part keep theirs."""
    path = write(cfg) / "manifest.json"
    values = json.loads(path.read_text())

    def identity(card, *, counts):
        files = {**values["files"], "README.md": {"size": 1, "sha256": card}}
        content = {"sub/file": [files["sub/file"][name] for name in ("size", "sha256")]}
        content |= {"README.md": [1, card]} if counts else {}
        its = digest([values["stage"], values["config_hash"], values["inputs"], content])
        path.write_text(json.dumps({**values, "files": files, "id": its}))
        assert manifest_of(path.parent).id == its
        return its

    assert identity("a", counts=False) == identity("b", counts=False) == values["id"]
    assert len({values["id"], identity("a", counts=True), identity("b", counts=True)}) == 3


def test_fingerprints(tmp_path, cfg):
    file = tmp_path / "a.txt"
    file.write_text("x")
    before = fingerprint(file)
    file.write_text("y")
    assert fingerprint(file) != before
    folder = tmp_path / "texts"
    folder.mkdir()
    with pytest.raises(ValueError, match="does not exist or is empty"):
        fingerprint(folder)
    (folder / "1.txt").write_text("x")
    before = fingerprint(folder)
    (folder / "1.txt").rename(folder / "2.txt")  # another order of documents
    assert fingerprint(folder) != before
    for end, text in ((".bin", "tokens"), (".idx", "index")):
        (tmp_path / f"corpus{end}").write_text(text)
    before = fingerprint(tmp_path / "corpus")
    (tmp_path / "corpus.bin").write_text("other")
    assert fingerprint(tmp_path / "corpus") != before
    manifest = open_result(write(cfg))
    assert fingerprint(cfg.output_dir) == f"export:{manifest.id}"


def test_config_hash_leaves_out_paths_and_neutral_keys(tmp_path):
    def digest(**keys):
        return config_hash(PruneConfig(**{"output_dir": "o", "checkpoint": "c", **keys}))

    assert digest() == digest(output_dir="p", checkpoint="d", workers=7, verify_inputs="size")
    assert digest() != digest(pruning=PruningConfig(drop_layers=[1]))


def test_the_hash_of_a_config_survives_new_keys():
    """Results keep their identity from version to version: a new key that decides something needs
    ``metadata=ADDED``, one that does not ``NEUTRAL`` (nemo_minitron/config/meaning.py)."""
    given: dict[str, Any] = {"output_dir": "o", "checkpoint": "c", "source": "s", "student": "s"}
    given |= {"teacher": "t", "prompts": "p", "total_tokens": 1}
    found = {}
    for stage, cls in STAGE_CONFIGS.items():
        if stage in ("pipeline", "plan"):  # nothing is made from what they leave
            continue
        keys: dict[str, Any] = {key: given[key] for key in given if key in cls.__dataclass_fields__}
        found[stage] = config_hash(cls(**keys))[:8]
    assert found == {
        "import": "8d5fbaf0",
        "data": "48149d9d",
        "importance": "b25b9c48",
        "prune": "a712c2f6",
        "search": "2cd61a25",
        "teacher_logits": "2366874d",
        "distill": "51a7bbc7",
        "finetune": "c3a8b222",
        "generate": "b18fc930",
        "evaluate": "0ee90846",
        "benchmark": "9e15ce83",
        "export": "b7b95ef0",
    }

"""Work that is kept to resume is what was written, or an error that names the file."""

from pathlib import Path

import pytest

from nemo_minitron.checkpoint.artifact import open_result, output_folder
from nemo_minitron.checkpoint.seals import check_seal, seal, sealed_file
from nemo_minitron.config.stages import ExportConfig
from nemo_minitron.data.cache import build_once
from tests.helpers.damage import flip_bit


@pytest.fixture
def kept(tmp_path):
    """A sealed folder with two files, and a sealed file."""
    folder, file = tmp_path / "work/rounds/1", tmp_path / "work/samples/0.jsonl"
    for name in ("a", "sub/b"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name * 50)
    file.parent.mkdir()
    file.write_text("sample\n" * 9)
    seal(folder, folder)
    seal(file, file)
    return folder, file


def test_a_flipped_bit_is_named(kept):
    folder, file = kept
    for path in kept:
        check_seal(path, "remove it")
    (folder / "plan.json").write_text("made later")
    check_seal(folder, "remove it")
    flip_bit(file)
    with pytest.raises(ValueError, match=r"0.jsonl is damaged: .*; remove it"):
        check_seal(file, "remove it")
    flip_bit(folder / "sub/b")
    with pytest.raises(ValueError, match=r"rounds/1/sub/b is damaged"):
        check_seal(folder, "remove it")
    (folder / "sub/b").unlink()
    with pytest.raises(ValueError, match=r"rounds/1/sub/b is damaged"):
        check_seal(folder, "remove it")


def test_damaged_hashes_and_none(kept):
    _, file = kept
    sums = file.parent.with_name("samples.sums") / "0.jsonl"
    for where in (0.1, 0.5, 0.99):
        flip_bit(sums, where)
        with pytest.raises(ValueError, match="damaged"):
            check_seal(file, "remove it")
        flip_bit(sums, where)
    check_seal(file, "remove it")
    sums.unlink()  # as an earlier version leaves it
    check_seal(file, "remove it")


def test_a_kill_before_the_hashes_leaves_no_file(tmp_path, monkeypatch):
    """What has a name has hashes."""

    def killed(path, content):
        raise KeyboardInterrupt

    monkeypatch.setattr("nemo_minitron.checkpoint.seals.seal", killed)
    with pytest.raises(KeyboardInterrupt), sealed_file(tmp_path / "0.jsonl") as draft:
        draft.write_text("sample\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damaged", [False, True])
def test_a_result_of_kept_work(tmp_path, damaged):
    """What was kept becomes part of the result if it is what was written."""
    (tmp_path / "model").write_text("weights")
    cfg = ExportConfig(output_dir=str(tmp_path / "out"), checkpoint=str(tmp_path / "model"))

    def write():
        with output_folder(cfg, "export", resumable=True, temporary=("samples",)) as work:
            for file in (work / "logits/0", work / "samples/0"):
                file.parent.mkdir(exist_ok=True)
                file.write_text("values" * 9)
                seal(file, file)
            if damaged:
                flip_bit(work / "logits/0")

    if damaged:
        with pytest.raises(ValueError, match=r"out.partial/logits/0 is damaged"):
            write()
        assert (tmp_path / "out.partial/logits.sums/0").is_file()
        return
    write()
    assert set(open_result(cfg.output_dir).files) == {"logits/0", ".hydra/config.yaml"}
    assert sorted(path.name for path in Path(cfg.output_dir).iterdir()) == sorted(
        (".hydra", "logits", "manifest.json")
    )


def test_a_cache_of_which_a_bit_has_flipped(tmp_path):
    folder = tmp_path / "cache/key"

    def fill(into):
        (into / "tokens.bin").write_bytes(bytes(range(200)))

    for _ in range(2):
        build_once(folder, fill)
    flip_bit(folder / "tokens.bin")
    with pytest.raises(ValueError, match=r"key/tokens.bin is damaged: .*; remove .*/cache/key"):
        build_once(folder, fill)
    flip_bit(folder / "tokens.bin")
    (folder / "later").mkdir()  # of another run: sample indices
    build_once(folder, fill)
    flip_bit(folder / "sha256.json", 0.6)
    with pytest.raises(ValueError, match="is damaged"):
        build_once(folder, fill)
    (folder / "sha256.json").unlink()  # as an earlier version leaves it
    build_once(folder, fill)

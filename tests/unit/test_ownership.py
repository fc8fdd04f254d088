"""What is the user's is never moved, removed or mixed; one process at a time writes a result."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_minitron.checkpoint import artifact, owners, watched
from nemo_minitron.checkpoint.artifact import check_output, open_result, output_folder, reserved
from nemo_minitron.checkpoint.manifest import files_in
from nemo_minitron.checkpoint.watched import changed_since, identity_of, input_states
from nemo_minitron.config.stages import ExportConfig, FinetuneConfig, ImportConfig
from nemo_minitron.config.training import DataConfig


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("model", "other"):
        (folder / name).write_text(f"{name} weights")
    return folder


@pytest.fixture
def cfg(tmp_path, source):
    return ExportConfig(output_dir=str(tmp_path / "runs/out"), checkpoint=str(source))


def write(cfg, meanwhile=lambda: None, **options):
    with output_folder(cfg, "export", **options) as folder:
        meanwhile()
        (folder / "file").write_text("new")
    return Path(cfg.output_dir)


def leave_work(cfg):
    """Fail, and leave something to resume."""

    def fail():
        (Path(f"{cfg.output_dir}.partial") / "step").write_text("7")
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        write(cfg, fail, resumable=True)


def tree(folder):
    return {p.relative_to(folder): p.read_text() for p in folder.rglob("*") if p.is_file()}


# What no stage wrote


def mine(path):
    """Something of the user's under a name."""
    if path.suffix == ".log":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("Dear diary\n")
    else:
        path.mkdir(parents=True)
        (path / "thesis.tex").write_text("mine")
    return path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("end", [".partial", ".old", ".log"])
def test_a_neighbour_that_no_stage_wrote_is_refused_and_stays(cfg, end, overwrite):
    if overwrite:
        write(cfg)
        cfg.overwrite = True
    mine(Path(cfg.output_dir + end))
    before = tree(Path(cfg.output_dir).parent)
    for call in (lambda: check_output(cfg, "export"), lambda: write(cfg)):
        with pytest.raises(ValueError, match=rf"out\{end} was not .* by minitron"):
            call()
    assert tree(Path(cfg.output_dir).parent) == before


@pytest.mark.parametrize("end", [".partial", ".old"])
@pytest.mark.parametrize("kind", ["copy of a result", "link", "file", "empty"])
def test_so_are_other_things_of_the_user(cfg, tmp_path, end, kind):
    other = Path(cfg.output_dir + end)
    other.parent.mkdir()
    if kind == "copy of a result":
        shutil.copytree(write(cfg), tmp_path / "kept")
        shutil.rmtree(cfg.output_dir)
        shutil.copytree(tmp_path / "kept", other)
    elif kind == "link":
        other.symlink_to(mine(tmp_path / "elsewhere"))
    else:
        other.write_text("mine") if kind == "file" else other.mkdir()
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=r"was not .* by minitron"):
        write(cfg)
    assert tree(tmp_path) == before
    assert other.is_symlink() == (kind == "link")
    assert other.exists()


@pytest.mark.parametrize("where", [".partial", ".old", ".old/a/b", ".partial/checkpoint", "/deep"])
def test_an_input_in_a_place_that_is_moved_or_removed(cfg, tmp_path, source, where):
    place = Path(cfg.output_dir + where)
    shutil.copytree(source, place)
    (tmp_path / "link").symlink_to(place)
    for path in (place, tmp_path / "link"):
        cfg.checkpoint = str(path)
        with pytest.raises(ValueError, match="would replace its own input checkpoint="):
            check_output(cfg, "export")
        with pytest.raises(ValueError, match="would replace its own input checkpoint="):
            write(cfg)
    assert tree(place) == tree(source)


def test_the_log_beside_a_link_and_logs_of_other_programs(cfg, tmp_path):
    (tmp_path / "big").mkdir()
    output = Path(cfg.output_dir)
    output.parent.mkdir()
    output.symlink_to(tmp_path / "big")
    log = Path(f"{output}.log")
    for text in ("2026-11-28 21:00:00,123 my program started\n", "notes"):
        log.write_text(text)
        with pytest.raises(ValueError, match=r"out.log was not written by minitron"):
            check_output(cfg, "export")
    for text in ("", "2026-11-28 21:00:00,123 INFO rank 3 nemo_minitron.cli: x\n"):
        log.write_text(text)
        check_output(cfg, "export")


def test_files_of_an_input_that_are_links_into_the_output(cfg, tmp_path):
    """As in a folder of links to the files of an export."""
    cfg.overwrite = True
    folder = tmp_path / "links"
    folder.mkdir()
    (folder / "model").symlink_to(write(cfg) / "file")
    cfg.checkpoint = str(folder)
    with pytest.raises(ValueError, match="would replace its own input"):
        write(cfg)


def test_a_pair_and_a_log_as_inputs(tmp_path):
    output = tmp_path / "out"
    data = DataConfig(path=f"{output}.old/corpus")
    model = str(tmp_path / "model")
    cfg = FinetuneConfig(checkpoint=model, output_dir=str(output), data=data)
    (tmp_path / "out.old").mkdir()
    for end in (".bin", ".idx"):
        (tmp_path / f"out.old/corpus{end}").write_text("x")
    with pytest.raises(ValueError, match=r"would replace its own input data.path"):
        check_output(cfg, "finetune")
    shutil.rmtree(tmp_path / "out.old")
    (tmp_path / "out.log").write_text("text to learn from")
    cfg.data.path = str(tmp_path / "out.log")
    with pytest.raises(ValueError, match=r"data.path=.* is the file that the log"):
        check_output(cfg, "finetune")


@pytest.mark.parametrize("link", [False, True])
def test_an_output_inside_an_input(cfg, tmp_path, source, link):
    cfg.output_dir = str(source / "runs/out")
    if link:  # the input holds a link to where the output is to go
        (tmp_path / "far").mkdir()
        (source / "more").symlink_to(tmp_path / "far")
        cfg.output_dir = str(tmp_path / "far/out")
    with pytest.raises(ValueError, match=r"lies inside its own input checkpoint="):
        check_output(cfg, "export")
    with pytest.raises(ValueError, match=r"lies inside its own input checkpoint="):
        write(cfg)


def test_a_cache_inside_an_input(tmp_path):
    """Filling it would change the input."""
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("text")
    data = DataConfig(path=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "corpus/cache"))
    model = str(tmp_path / "model")
    cfg = FinetuneConfig(checkpoint=model, output_dir=str(tmp_path / "out"), data=data)
    with pytest.raises(ValueError, match=r"data.cache_dir=.* lies in the input data.path="):
        check_output(cfg, "finetune")


def test_a_tokenizer_is_an_input_too(tmp_path, source):
    shutil.copytree(source, tmp_path / "out.partial")
    tokenizer = str(tmp_path / "out.partial")
    with pytest.raises(ValueError, match="would replace its own input tokenizer="):
        check_output(
            ImportConfig(output_dir=str(tmp_path / "out"), source=str(source), tokenizer=tokenizer),
            "import",
        )


# What a user added to a result


@pytest.mark.parametrize("damaged", [False, True])
def test_files_that_a_user_added_are_named_before_a_result_is_replaced(cfg, damaged):
    folder = write(cfg)
    cfg.overwrite = True
    (folder / "notes").mkdir()
    (folder / "notes/ideas.md").write_text("mine")
    if damaged:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[:-30])
    with pytest.raises(ValueError, match=r"holds files that no stage wrote \(notes/ideas.md\)"):
        write(cfg)
    assert (folder / "notes/ideas.md").read_text() == "mine"
    shutil.rmtree(folder / "notes")
    assert open_result(write(cfg))


def test_a_manifest_of_another_program(cfg):
    cfg.overwrite = True
    Path(cfg.output_dir).mkdir(parents=True)
    manifest = Path(cfg.output_dir) / "manifest.json"
    manifest.write_text('{"name": "my page", "icons": []}')
    with pytest.raises(ValueError, match="is not a result"):
        write(cfg)
    assert "my page" in manifest.read_text()


def test_files_that_a_user_adds_while_a_stage_runs(cfg):
    folder = write(cfg)
    cfg.overwrite = True
    with pytest.raises(ValueError, match="no stage wrote"):
        write(cfg, lambda: (folder / "notes").write_text("mine"))
    assert (folder / "notes").read_text() == "mine"


def test_a_folder_that_appears_while_a_stage_runs(cfg):
    with pytest.raises(ValueError, match="is not a result"):
        write(cfg, lambda: mine(Path(cfg.output_dir)), resumable=True)
    assert (Path(cfg.output_dir) / "thesis.tex").read_text() == "mine"
    assert (Path(f"{cfg.output_dir}.partial") / "file").read_text() == "new"


# Inputs that change while they are read


def replace(source):
    """Another folder under the same name."""
    source.rename(source.with_name("before"))
    shutil.copytree(source.with_name("before"), source)
    (source / "other").write_text("OTHER WEIGHTS")


def edit(source):
    with open(source / "other", "r+") as file:
        file.write("X")


def edit_and_hide(source):
    times = (source / "other").stat()
    edit(source)
    os.utime(source / "other", ns=(times.st_atime_ns, times.st_mtime_ns))


def add(source):
    (source / "third").write_text("weights")


@pytest.mark.parametrize("change", [replace, edit, edit_and_hide, add])
@pytest.mark.parametrize("resumable", [False, True])
def test_an_input_that_changes_gives_no_result(cfg, source, change, resumable):
    with pytest.raises(ValueError, match=r"checkpoint=.* changed while it was read"):
        write(cfg, lambda: change(source), resumable=resumable)
    assert not Path(cfg.output_dir).exists()
    assert Path(f"{cfg.output_dir}.partial").exists() == resumable


def test_a_touched_input_is_the_same(cfg, source):
    assert open_result(write(cfg, lambda: os.utime(source / "model")))


def test_of_a_tokenizers_folder_only_its_files_are_watched(tmp_path, source):
    """The weights that it came with may be large, and are not read."""
    tokenizer = tmp_path / "whole model"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    cfg = ImportConfig(
        output_dir=str(tmp_path / "out"), source=str(source), tokenizer=str(tokenizer)
    )
    weights = tokenizer / "model.safetensors"
    before = input_states(cfg), identity_of("tokenizer", tokenizer, 1)
    weights.write_text("weights")
    weights.chmod(0)
    assert (input_states(cfg), identity_of("tokenizer", tokenizer, 1)) == before
    (tokenizer / "tokenizer.json").write_text("{ }")
    assert changed_since(cfg, before[0]) == ["tokenizer"]
    assert identity_of("tokenizer", tokenizer, 1) != before[1]


def test_links_beside_a_tokenizer_lead_nowhere(tmp_path, source):
    """Nobody reads what they lead to, and a folder with a tokenizer may hold very much."""
    tokenizer = tmp_path / "home"
    (tokenizer / "runs").mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "runs" / "last").symlink_to(tmp_path / "out")
    cfg = ImportConfig(
        output_dir=str(tmp_path / "out"), source=str(source), tokenizer=str(tokenizer)
    )
    check_output(cfg, "import")


def test_links_in_a_circle_have_an_end(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        (tmp_path / name / "up").symlink_to(tmp_path)
        (tmp_path / name / "here").symlink_to(".")
    found = files_in(tmp_path)
    assert {"a/file", "b/file"} <= set(found)
    assert len(found) < 40


def test_a_folder_with_more_files_than_a_model(tmp_path, source, monkeypatch):
    monkeypatch.setattr(watched, "_MOST_FILES", 2)
    cfg = ImportConfig(output_dir=str(tmp_path / "out"), source=str(tmp_path / "plain"))
    (tmp_path / "plain").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (tmp_path / "plain" / name).write_text("Some text.")
    with pytest.raises(ValueError, match=r"plain holds 3 files, more than any model; set source"):
        input_states(cfg)
    data = DataConfig(path=str(tmp_path / "plain"))
    tuning = FinetuneConfig(checkpoint=str(source), output_dir=str(tmp_path / "out"), data=data)
    assert input_states(tuning).keys() == {"checkpoint", "data.path"}


def test_bytecode_beside_tasks_is_no_change(cfg, source):
    """Python writes it when lm-eval imports what a task names."""
    (source / "__pycache__").mkdir()
    assert open_result(write(cfg, lambda: (source / "__pycache__/utils.pyc").write_text("x")))


def test_work_of_two_versions_of_an_input_is_not_resumed(cfg, source):
    """Also when the first version is there again."""
    before = (source / "other").read_text()
    with pytest.raises(ValueError, match="changed while it was read"):
        write(cfg, lambda: edit(source), resumable=True)
    (source / "other").write_text(before)
    with pytest.raises(ValueError, match=r"an input was another one for a time .*remove that"):
        write(cfg, resumable=True)
    shutil.rmtree(f"{cfg.output_dir}.partial")
    assert open_result(write(cfg, resumable=True))


def test_a_result_that_is_replaced_or_damaged_while_it_is_read(cfg, tmp_path, source):
    teacher = ExportConfig(output_dir=str(tmp_path / "teacher"), checkpoint=str(source))
    folder = write(teacher)
    teacher.overwrite, cfg.checkpoint = True, str(folder)

    def another():
        (source / "model").write_text("of another teacher")
        write(teacher)

    with pytest.raises(ValueError, match=r"checkpoint=.* changed while it was read"):
        write(cfg, another)
    with pytest.raises(ValueError, match="file is changed"):
        write(cfg, lambda: (folder / "file").write_text("NEW"))
    write(teacher)

    def later():
        time.sleep(1.1)  # after others: nobody can tell
        write(teacher)

    with pytest.raises(ValueError, match="changed while it was read"):  # by an equal one, perhaps
        write(cfg, later)
    assert open_result(write(cfg, lambda: write(teacher), resumable=True))


def test_what_a_mixture_makes_of_a_stage_is_said(cfg, source):
    def read():
        replace(source)
        raise RuntimeError("size mismatch")

    with pytest.raises(ValueError, match="changed while it was read") as raised:
        write(cfg, read)
    assert "size mismatch" in str(raised.value.__context__)


def test_an_input_that_changes_between_its_check_and_the_run(cfg, source):
    with reserved(cfg, "export"):
        edit(source)
        with pytest.raises(ValueError, match="changed while it was read"):
            write(cfg)


# One process at a time

HOLD = """
import socket, sys
if sys.argv[3]:
    socket.gethostname = lambda: sys.argv[3]
from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.config.stages import ExportConfig
cfg = ExportConfig(output_dir=sys.argv[1], checkpoint=sys.argv[2])
with output_folder(cfg, "export", resumable=True) as folder:
    (folder / "step").write_text("7")
    print(flush=True)
    input()
"""


@pytest.fixture
def hold(cfg):
    """Starts another process that writes the same result, perhaps on another host."""
    started = []

    def start(host=""):
        line = [sys.executable, "-c", HOLD, cfg.output_dir, cfg.checkpoint, host]
        other = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(other)
        assert other.stdout is not None
        other.stdout.readline()
        return other

    yield start
    for other in started:
        other.kill()
        other.wait()


@pytest.mark.parametrize("host", ["", "node-7"])
def test_a_result_that_is_being_written_is_refused(cfg, hold, host):
    other = hold(host)
    work = Path(f"{cfg.output_dir}.partial")
    said = rf"being written by process {other.pid} on {host}"
    for call in (lambda: write(cfg, resumable=True), lambda: reserved(cfg, "export").__enter__()):
        with pytest.raises(ValueError, match=said) as raised:
            call()
        assert ("touch -d" in str(raised.value)) == bool(host)
        assert (work / "step").read_text() == "7"
    other.communicate(b"\n")
    assert (Path(cfg.output_dir) / "step").read_text() == "7"


def test_the_owner_on_another_host_is_gone(cfg, hold):
    """It is not, until it has shown no sign of life for long."""
    other = hold("node-7")
    other.kill()
    other.wait()
    with pytest.raises(ValueError, match="on node-7"):
        write(cfg, resumable=True)
    long_ago = time.time() - owners.STALE - 1
    os.utime(f"{cfg.output_dir}.partial/owner.json", (long_ago, long_ago))
    assert (write(cfg, resumable=True) / "step").read_text() == "7"


def test_a_requeued_job_goes_on_at_once(cfg, hold, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    other = hold("node-7")
    with pytest.raises(ValueError, match="on node-7"):  # two job steps of one job
        write(cfg, resumable=True)
    other.kill()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (write(cfg, resumable=True) / "step").read_text() == "7"


def test_what_was_released_is_anybodys(cfg, monkeypatch):
    leave_work(cfg)
    monkeypatch.setattr("socket.gethostname", lambda: "node-8")
    assert (write(cfg, resumable=True) / "step").read_text() == "7"


def test_work_of_an_earlier_version_is_resumed(cfg, source):
    """It signed with one file, which held everything."""
    work = Path(f"{cfg.output_dir}.partial")
    leave_work(cfg)
    (work / "owner.json").unlink()
    signed = json.loads((work / "partial.json").read_text())
    gone = {"host": "node-7", "pid": 1, "started": 0.0}
    (work / "partial.json").write_text(json.dumps({**signed, **gone}))
    os.utime(work / "partial.json", (1, 1))
    assert (write(cfg, resumable=True) / "step").read_text() == "7"


def test_of_many_that_find_a_dead_owner_one_goes_on(cfg, hold, tmp_path):
    other = hold()
    other.kill()
    other.wait()
    code = HOLD.replace("input()", "import time; time.sleep(3)")
    line = [sys.executable, "-c", code, cfg.output_dir, cfg.checkpoint, ""]
    many = [subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in "ab"]
    said = [one.communicate()[1].decode() for one in many]
    assert sorted(one.returncode for one in many) == [0, 1]
    assert sum("is being written by process" in text for text in said) == 1
    assert open_result(cfg.output_dir)
    assert sorted(os.listdir(Path(cfg.output_dir).parent)) == ["out"]


def test_a_folder_that_was_taken_over_is_left_alone(cfg, monkeypatch):
    work = Path(f"{cfg.output_dir}.partial")

    def take():
        (work / "owner.json").write_text(json.dumps({"token": "x", "pid": 7, "host": "node-7"}))

    with pytest.raises(ValueError, match="was taken over by process 7 on node-7"):
        write(cfg, take)
    assert (work / "file").read_text() == "new"


def test_nothing_stays_of_a_refused_command(cfg, tmp_path):
    cfg.checkpoint = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="does not exist"):
        write(cfg)
    with pytest.raises(ValueError, match="bad input"), reserved(cfg, "export"):
        raise ValueError("bad input")
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_what_a_kill_left_of_folders_on_their_way_is_removed(cfg):
    parent = Path(cfg.output_dir).parent
    trash = mine(parent / f".out.partial.{'0' * 32}.trash")
    theirs = mine(parent / ".out.partial.notes")
    write(cfg)
    assert not trash.exists()
    assert theirs.exists()
    assert artifact.partial_of(Path(cfg.output_dir)).exists() is False

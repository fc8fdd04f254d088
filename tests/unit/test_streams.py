"""Standard streams that are closed, full, or read by nobody any more."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_minitron.runtime.errors import verdict
from tests.helpers import fake_stages

COMMAND = f"'{sys.executable}' -m nemo_minitron"
TABLE = "from nemo_minitron.runtime.console import show_table; show_table('t', ('a',), [('b',)])"


def shell(tmp_path: Path, line: str) -> "subprocess.CompletedProcess[str]":
    """A line of bash, with the fake stages in every Python process."""
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        env=fake_stages.environment(tmp_path),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
    )


@pytest.mark.parametrize("arguments", ["--help", "prune --help", "from-megatron --lr 1e-4"])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, arguments):
    ended = shell(tmp_path, f"{COMMAND} {arguments} | true")
    assert ended.returncode == 0, ended.stderr
    assert "stdout" not in ended.stderr


@pytest.mark.parametrize("arguments", ["--help", "from-megatron --lr 1e-4"])
def test_what_could_not_be_written_is_said(tmp_path, arguments):
    ended = shell(tmp_path, f"{COMMAND} {arguments} > /dev/full")
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last == "minitron: stdout takes nothing more: No space left on device"


@pytest.mark.parametrize("to", ["| true", "> /dev/full", ">&-"])
def test_a_table_that_nobody_sees_ends_no_work(tmp_path, to):
    """Which would kill a pipeline in the middle, with nothing said."""
    ended = shell(tmp_path, f"""'{sys.executable}' -c "{TABLE}; {TABLE}; print('on')" {to}""")
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("tables are not shown") == (to == "> /dev/full")


@pytest.mark.parametrize("to", ["2> /dev/full", "2>&-"])
@pytest.mark.parametrize("arguments", ["prune nope=1", "nope", "prune"])
def test_the_exit_code_stands_without_stderr(tmp_path, arguments, to):
    assert shell(tmp_path, f"{COMMAND} {arguments} {to}").returncode == 2


def test_a_limit_on_the_size_of_files_is_named():
    code, message = verdict("prune", OSError(errno.EFBIG, "File too large"), Path("out.log"))
    assert code == 1
    assert message.startswith("a file may not grow any more (out.log): raise the limit (ulimit -f)")


@pytest.mark.parametrize("keys", ["checkpoint=loop output_dir=out", "checkpoint=a output_dir=loop"])
def test_links_in_a_circle_are_bad_input(tmp_path, keys):
    (tmp_path / "loop").symlink_to("loop")
    ended = shell(tmp_path, f"{COMMAND} prune pruning.drop_layers=[1] {keys}")
    assert ended.returncode == 2
    assert "loop" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr

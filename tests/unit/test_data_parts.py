"""Processes that write the tokens of one file each."""

import multiprocessing
import os

import pytest

from nemo_minitron.data.parts import begin


@pytest.mark.parametrize(("mine", "code"), [(True, 0), (False, 1)])
def test_one_whose_parent_died_before_it_began_ends_at_once(mine: bool, code: int) -> None:
    """It would write beside the processes of the next run otherwise."""
    context = multiprocessing.get_context("spawn")
    stop, parent = context.Event(), os.getpid() if mine else os.getppid()
    process = context.Process(target=begin, args=(stop, 1, parent))
    process.start()
    process.join(60)
    assert process.exitcode == code

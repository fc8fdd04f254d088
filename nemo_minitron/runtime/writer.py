"""Keeps the helper process of Megatron's checkpoint writer alive when a job is told to stop.

SLURM signals every process of a job step and torchrun whole process groups. The helper collects
what the writers of a checkpoint did: were it to die of the signal, the checkpoint that the signal
asks for could not be written.
"""

import multiprocessing
import signal
from multiprocessing.managers import SyncManager

from nemo_minitron.runtime import endings
from nemo_minitron.runtime.extensions import before_megatron
from nemo_minitron.runtime.supervise import die_with_parent


def start_writer_helper() -> None:
    """Start the helper that Megatron would start at its first checkpoint, deaf to stop signals."""
    before_megatron()
    # Not at the top: the helper imports this module, and half a gigabyte of torch with it.
    from nemo_minitron.runtime.megatron import writer_module

    module = writer_module()
    if module._results_queue is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        with endings.held():  # it starts with signals held back, and never takes them
            manager.start(initializer=_stay)
        module._results_queue = manager.Queue()  # it holds the manager


def _stay() -> None:
    """Outlive the signals that ask to stop, but not the process that writes checkpoints."""
    for number in endings.ALL:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()

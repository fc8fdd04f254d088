"""Let the first rank run a program that now and then needs all ranks for a model call."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_minitron.runtime.worlds import barrier

T = TypeVar("T")
Q = TypeVar("Q")
A = TypeVar("A")


def led_by_first(work: Callable[[Callable[[Q], A]], T], answer: Callable[[Q], A]) -> T:
    """Run ``work`` on rank 0; all ranks answer each of its questions together.

    Args:
        work: gets a function that takes a question (anything that pickles) and returns its answer.
        answer: answers a question, collective.

    Returns:
        What ``work`` returned, on every rank.

    Raises:
        Exception: what ``work`` or ``answer`` raised; a ``RuntimeError`` with its text on the
            ranks that did not raise it themselves (``ValueError`` stays one).
    """
    if dist.get_rank() == 0:
        return _lead(work, answer)
    while True:
        kind, content = _broadcast(None)
        if kind == "result":
            return content
        if kind == "error":
            raise content
        answer(content)


def _lead(work: Callable[[Callable[[Q], A]], T], answer: Callable[[Q], A]) -> T:
    answering = False

    def ask(question: Q) -> A:
        nonlocal answering
        _broadcast(("question", question))
        answering = True
        found = answer(question)
        answering = False
        return found

    try:
        result = work(ask)
    except Exception as error:
        if not answering:  # else the other ranks have raised it too
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            _broadcast(("error", kind(str(error))))
        raise
    _broadcast(("result", result))
    return result


def _broadcast(message: tuple[str, object] | None) -> tuple[str, Any]:
    box: list[Any] = [message]
    barrier()  # rank 0 may work between two questions for longer than a collective waits
    dist.broadcast_object_list(box, src=0, group=dist.group.WORLD)
    found: tuple[str, Any] = box[0]
    return found

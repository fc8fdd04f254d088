"""What one rank finds out and all have to know, so that none waits for one that has given up."""

import tarfile
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from nemo_minitron.runtime.worlds import barrier

Result = TypeVar("Result")


def agreed(check: Callable[[], Result]) -> Result:
    """Run a check on every rank (collective) and return what it returns.

    Raises:
        ValueError: what the first rank that refuses says, on every rank.
    """
    result, said = [], None
    try:
        result.append(check())
    except ValueError as error:
        said = _plain(error)
    _raise_first(said)
    return result[0]


def from_first(find: Callable[[], Result]) -> Result:
    """Return on every rank what rank 0 finds, as long as that takes; the others do not look.

    A call of every rank.

    Raises:
        ValueError: what rank 0 says that refuses, on every rank.
        OSError: what rank 0 says that fails otherwise, on every rank.
    """
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = find()
        except (ValueError, OSError) as error:
            box[1] = _plain(error)
    barrier()
    dist.broadcast_object_list(box, src=0, group=dist.group.WORLD)
    if box[1] is not None:
        raise box[1]
    found: Result = box[0]
    return found


def together(step: Callable[[], None] | None) -> None:
    """Take a step and wait for the other ranks, as long as rank 0 takes for its own (collective).

    Args:
        step: of this rank; None where only others have one.

    Raises:
        ValueError: what the first rank says whose step refuses its input, on every rank.
        OSError: what the first rank says whose step fails otherwise, on every rank.
    """
    said: Exception | None = None
    try:
        if step is not None:
            step()
    except (ValueError, OSError, RuntimeError, tarfile.TarError) as error:
        said = _plain(error)
    barrier()
    _raise_first(said)


def _plain(error: Exception) -> Exception:
    """What may travel between ranks; the number of an ``OSError`` decides what the job says."""
    if isinstance(error, ValueError):
        return ValueError(str(error))
    if isinstance(error, OSError) and error.errno:
        return OSError(error.errno, error.strerror, error.filename)
    return OSError(str(error))


def _raise_first(said: Exception | None) -> None:
    """Raise on every rank what the first one says that says anything."""
    answers: list[Exception | None] = [said] * dist.get_world_size()
    # Every rank has to learn of it, whatever it shares with the one that refuses.
    dist.all_gather_object(answers, said, group=dist.group.WORLD)
    for error in filter(None, answers):
        raise error

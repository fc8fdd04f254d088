"""Read what a ``torch_dist`` checkpoint holds beside its tensors: settings, iteration, versions.

Megatron-Core before 0.19 writes it to a file of its own, ``common.pt``; since 0.19 it is an object
among the tensors, ``common_state``. Both are pickles of one dictionary.
"""

from pathlib import Path

from nemo_minitron.checkpoint.parts import Find, Part, piece_of
from nemo_minitron.checkpoint.safe_pickle import PICKLE_ERRORS, read_metadata, read_torch_file
from nemo_minitron.documents import JsonObject

COMMON_PT = "common.pt"
COMMON_KEY = "common_state/shard_0_1"
_METADATA = ".metadata"


def read_common(where: Path, find: Find) -> tuple[str, JsonObject]:
    """Read it without running anything that is in it.

    Args:
        where: the checkpoint's folder, for messages.
        find: looks its files up.

    Returns:
        What to call the place in messages, and the dictionary.

    Raises:
        ValueError: the common state is missing or damaged.
    """
    name, part = str(where / COMMON_PT), find(COMMON_PT)
    if part is None:
        name, part = f"{COMMON_KEY} in {where}", _object(where, find)
    if part is None:
        raise ValueError(
            f"{where / COMMON_PT} is missing, which says what model this is; nor is there the "
            f"object {COMMON_KEY.partition('/')[0]} that Megatron-Core 0.19 and later write instead"
        )
    try:
        found = read_torch_file(part)
    except PICKLE_ERRORS as error:
        raise ValueError(f"{name} is damaged: {error}") from error
    if isinstance(found, list) and len(found) == 1:  # as an object among tensors is wrapped
        found = found[0]
    return name, found if isinstance(found, dict) else {}


def _object(where: Path, find: Find) -> Part | None:
    """Find where the object is stored; None if the checkpoint does not have it."""
    part = find(_METADATA)
    if part is None:
        return None
    try:
        storage = read_metadata(part).storage_data
        info = next((info for index, info in storage.items() if index.fqn == COMMON_KEY), None)
        file = None if info is None else find(info.relative_path)
    except PICKLE_ERRORS as error:
        raise ValueError(f"{where / _METADATA} is damaged: {error}") from error
    if info is None:
        return None
    return piece_of(where / info.relative_path, file, info.offset, info.length)

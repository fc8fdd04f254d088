"""Makes the ``.metadata`` of a checkpoint a function of what the checkpoint holds.

torch writes a random id and the path of the folder into it, Megatron the plans of its ranks, and
entries stand in the order in which writers ended. Nobody reads any of that again; but a result
whose files differ from run to run would have another identity every time.
"""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from nemo_minitron.checkpoint.parts import in_folder
from nemo_minitron.checkpoint.safe_pickle import read_metadata
from nemo_minitron.runtime.atomic import atomic_file

_METADATA = ".metadata"


def settle_metadata(folder: Path) -> None:
    """Write the ``.metadata`` of a complete checkpoint anew, without what differs between runs.

    Args:
        folder: of a ``torch_dist`` checkpoint that this process may change.
    """
    part = in_folder(folder)(_METADATA)
    assert part is not None, folder
    found = read_metadata(part)
    with atomic_file(folder / _METADATA) as draft:
        draft.write_bytes(_pickled(_settled(found)))


def _settled(found: Metadata) -> Metadata:
    """The declared fields alone, entries in order."""
    storage = sorted(found.storage_data.items(), key=lambda item: _place(item[0]))
    return replace(
        found,
        state_dict_metadata=dict(sorted(found.state_dict_metadata.items())),
        storage_data=dict(storage),
        storage_meta=None,
    )


def _place(index: Any) -> tuple[str, tuple[int, ...], int]:
    return index.fqn, tuple(index.offset or ()), index.index or 0


def _pickled(value: Any) -> bytes:
    """A pickle without references to what came before.

    Those tell which equal strings were one object in memory, which differs from run to run.
    """
    into = io.BytesIO()
    pickler = pickle.Pickler(into, protocol=4)
    pickler.fast = True
    pickler.dump(value)
    return into.getvalue()

"""Refuses a checkpoint that would run code when Megatron and torch read it."""

import io
import sys
import zipfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from nemo_minitron.checkpoint.common_state import COMMON_PT
from nemo_minitron.checkpoint.parts import Part, in_folder, piece_of
from nemo_minitron.checkpoint.safe_pickle import PICKLE_ERRORS
from nemo_minitron.checkpoint.torch_dist_read import check_format, checked_metadata
from nemo_minitron.checkpoint.torch_dist_rows import in_native_order, refuse_packed

_EXTRA_STATE = "_extra_state"
"""Objects of Transformer Engine: one for every layer, and never loaded by this package."""


def refuse_code(folder: Path) -> Metadata:
    """Refuse a checkpoint that asks for anything but tensors and plain values.

    Megatron and torch read ``.metadata``, and objects among the tensors, as pickles that may name
    any function to call. A result may come from somebody else, so whatever they will read is read
    here first, by readers that look up nothing but what a checkpoint needs.

    Returns:
        What the checkpoint holds.

    Raises:
        ValueError: names the file, and the function or class that it asks for; or the file is
            missing, damaged, or names a file outside the folder.
    """
    find = in_folder(folder)
    check_format(folder, find)
    metadata = checked_metadata(folder, find, strict=True)
    common = find(COMMON_PT)
    if common is not None:
        _check_object(str(folder / COMMON_PT), common)
    for index, info in metadata.storage_data.items():
        saved = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(saved, BytesStorageMetadata) and _EXTRA_STATE not in index.fqn:
            path, file = folder / info.relative_path, find(info.relative_path)
            _check_object(f"{index.fqn} in {path}", piece_of(path, file, info.offset, info.length))
    return metadata


def _check_object(where: str, part: Part) -> None:
    """Read a file of ``torch.save`` as torch reads one that is not trusted."""
    text = io.BytesIO(part.read())
    try:
        with zipfile.ZipFile(text) as archive:
            refuse_packed(archive.infolist(), part.size)
            if not in_native_order(archive):  # torch would end the process: tensors have no bytes
                raise ValueError(f"it is not in this machine's byte order, {sys.byteorder}")
        text.seek(0)
        torch.load(text, map_location="meta", weights_only=True)
    except PICKLE_ERRORS as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{where} is damaged, or asks for more than tensors and plain values: {reason}"
        ) from error

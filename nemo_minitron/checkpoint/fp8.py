"""Weights in FP8 with a scale for each block (DeepSeek-V3), read as bfloat16.

A weight ``x.weight`` of FP8 has a tensor ``x.weight_scale_inv`` beside it, with one number for each
block of rows and columns, by which the values of the block are multiplied.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from nemo_minitron.checkpoint.lazy import LazyTensor, Store
from nemo_minitron.documents import JsonObject

QUANTISED = "quantization_config"
FP8 = {"F8_E4M3": torch.float8_e4m3fn}
_SCALES = "_scale_inv"


def fp8_block(config: JsonObject) -> tuple[int, int] | None:
    """Return rows and columns of an FP8 block; None if config.json tells of no such weights."""
    said = config.get(QUANTISED)
    if not isinstance(said, dict) or said.get("quant_method") != "fp8":
        return None
    block = said.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2:
        return None
    rows, columns = block
    whole = isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0
    return (rows, columns) if whole else None


def dequantised(store: Store, block: tuple[int, int]) -> Store:
    """Return a store that gives FP8 weights as bfloat16 and leaves out their scales.

    Args:
        store: as the files hold it.
        block: rows and columns that share a scale.

    Raises:
        ValueError: a weight lacks its scales, they do not fit it, or scales lack their weight.
    """
    found = {name: tensor for name, tensor in store.items() if not name.endswith(_SCALES)}
    scales = {name.removesuffix(_SCALES): store[name] for name in store.keys() - found.keys()}
    for name, tensor in found.items():
        quantised = tensor.dtype in FP8.values()
        if quantised != (name in scales):
            held = "FP8 without scales" if quantised else "not FP8, but has scales"
            raise ValueError(f"{tensor.origin}: {name} is {held} ({name}{_SCALES}); download again")
        if not quantised:
            continue
        scale = scales.pop(name)
        if len(tensor.shape) != len(block):
            raise ValueError(
                f"{tensor.origin}: {name} is FP8 of shape {tensor.shape}, and weight_block_size="
                f"{list(block)} needs rows and columns; set source to a model that is not quantised"
            )
        wanted = tuple(-(-size // step) for size, step in zip(tensor.shape, block, strict=True))
        if scale.shape != wanted:
            raise ValueError(
                f"{scale.origin}: {name}{_SCALES} has shape {scale.shape}; weight_block_size="
                f"{list(block)} asks for {wanted}"
            )
        rows = partial(_read_rows, tensor, scale, block)
        read = partial(rows, 0, tensor.shape[0])
        found[name] = replace(tensor, dtype=torch.bfloat16, read=read, read_rows=rows)
    for name, scale in scales.items():
        raise ValueError(f"{scale.origin}: {name}{_SCALES} has no weight; download the files again")
    return found


def _read_rows(
    weight: LazyTensor, scale: LazyTensor, block: tuple[int, int], start: int, stop: int
) -> Tensor:
    assert weight.read_rows is not None  # it comes from a file
    first = start // block[0]
    factors = scale.read().float()[first : -(-stop // block[0])].repeat_interleave(block[0], 0)
    factors = factors[start - first * block[0] :][: stop - start]
    factors = factors.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
    return (weight.read_rows(start, stop).float() * factors).to(torch.bfloat16)

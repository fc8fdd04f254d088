"""Weights of experts in MXFP4 (gpt-oss), read as bfloat16.

Of a weight ``x`` of all experts the file holds ``x_blocks`` ``[e, rows, blocks, 16]``, bytes with
two numbers of four bits each, the lower four bits first, and ``x_scales`` ``[e, rows, blocks]``:
the power of two that the 32 numbers of a block are multiplied by, plus 127 (the OCP's
Microscaling Formats, version 1.0). The model has the weight transposed, ``[e, 32 blocks, rows]``.
"""

from functools import partial

import torch
from torch import Tensor

from nemo_minitron.checkpoint.fp8 import QUANTISED
from nemo_minitron.checkpoint.lazy import LazyTensor, Store
from nemo_minitron.documents import JsonObject

MXFP4 = {"U8": torch.uint8}
_BLOCKS, _SCALES = "_blocks", "_scales"
_BIAS, _BYTES = 127, 16
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_NUMBERS = torch.tensor([*_POSITIVE, *(-number for number in _POSITIVE)], dtype=torch.bfloat16)


def is_mxfp4(config: JsonObject) -> bool:
    """Whether config.json says that weights are stored so."""
    said = config.get(QUANTISED)
    return isinstance(said, dict) and said.get("quant_method") == "mxfp4"


def numbers_of(blocks: Tensor, scales: Tensor) -> Tensor:
    """``[..., rows, blocks, 16]`` and ``[..., rows, blocks]`` bytes -> ``[..., 32 blocks, rows]``.

    Returns:
        Contiguous bfloat16, in which every such number is exact unless it overflows.
    """
    pairs = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).int()
    values = torch.ldexp(_NUMBERS[pairs], scales[..., None].int() - _BIAS)
    return values.to(torch.bfloat16).flatten(-2).transpose(-2, -1).contiguous()


def dequantised_experts(store: Store) -> Store:
    """Return a store with one bfloat16 tensor in place of blocks and scales.

    Args:
        store: as the files hold it.

    Raises:
        ValueError: blocks lack their scales or the other way round, or their shapes do not fit.
    """
    ends = (_BLOCKS, _SCALES)
    found = {name: tensor for name, tensor in store.items() if not name.endswith(ends)}
    for name in sorted({n.removesuffix(_BLOCKS).removesuffix(_SCALES) for n in store} - {*found}):
        missing = [name + end for end in ends if name + end not in store]
        if missing:
            origin = next(store[name + end].origin for end in ends if name + end in store)
            raise ValueError(f"{origin}: {missing[0]} is missing; download the files again")
        blocks, scales = store[name + _BLOCKS], store[name + _SCALES]
        if len(blocks.shape) != 4 or blocks.shape != (*scales.shape, _BYTES):
            raise ValueError(
                f"{blocks.origin}: {name}{_BLOCKS} has shape {blocks.shape} and {name}{_SCALES} "
                f"{scales.shape}; MXFP4 needs {_BYTES} bytes for every scale: download again"
            )
        found[name] = _tensor(blocks, scales)
    for name, tensor in found.items():
        if tensor.dtype not in (torch.bfloat16, torch.float32, torch.float16):
            raise ValueError(f"{tensor.origin}: {name} is {tensor.dtype}, no dtype of weights")
    return found


def _tensor(blocks: LazyTensor, scales: LazyTensor) -> LazyTensor:
    experts, rows, count, width = blocks.shape

    def read_rows(start: int, stop: int) -> Tensor:
        assert blocks.read_rows is not None
        assert scales.read_rows is not None  # both come from a file
        return numbers_of(blocks.read_rows(start, stop), scales.read_rows(start, stop))

    shape, read = (experts, count * width * 2, rows), partial(read_rows, 0, experts)
    return LazyTensor(shape, torch.bfloat16, read, read_rows, origin=blocks.origin)

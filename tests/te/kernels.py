"""Transformer Engine's kernels in plain torch, so that its modules run on a CPU in a test.

They take the place of ``forward`` of Transformer Engine's own classes. Megatron's classes above
them (fused norms, grouped experts, sequence parallelism) are the real ones, and so is where every
hook sits. What this cannot show is what the kernels themselves compute.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor


def _norm(module: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if module.zero_centered_gamma:
        weight = weight + 1
    if bias is None:
        return F.rms_norm(x, weight.shape, weight, module.eps)
    return F.layer_norm(x, weight.shape, weight, bias, module.eps)


def _plain_norm(module: Any, x: Tensor) -> Tensor:
    return _norm(module, x, module.weight, getattr(module, "bias", None))


def _product(module: Any, x: Tensor) -> Any:
    """The matrix product and what tensor parallelism does around it."""
    from megatron.core import tensor_parallel as tp

    group, split = module.tp_group, module.sequence_parallel
    many = module.parallel_mode is not None and module.tp_size > 1
    if many and module.parallel_mode == "column":
        if split:
            x = tp.gather_from_sequence_parallel_region(x, group=group)
        else:
            x = tp.copy_to_tensor_model_parallel_region(x, group=group)
    bias = module.bias if module.use_bias else None
    whole = many and module.parallel_mode == "row"
    out = F.linear(x, module.weight, None if whole or module.return_bias else bias)
    if whole and split:
        out = tp.reduce_scatter_to_sequence_parallel_region(out, group=group)
    elif whole:
        out = tp.reduce_from_tensor_model_parallel_region(out, group=group)
    if module.return_bias:
        return out, bias
    return out if not whole or bias is None else out + bias


def _linear(module: Any, x: Tensor, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
    return _product(module, x)


def _norm_linear(module: Any, x: Tensor, is_first_microbatch: Any = None, **kwargs: Any) -> Any:
    bias = module.layer_norm_bias if module.normalization == "LayerNorm" else None
    return _product(module, _norm(module, x, module.layer_norm_weight, bias))


def _grouped(
    module: Any, x: Tensor, m_splits: list[int], is_first_microbatch: Any = None, **kwargs: Any
) -> Tensor:
    assert module.parallel_mode is None or module.tp_size == 1
    assert len(m_splits) == module.num_gemms
    assert sum(m_splits) == len(x)
    parts = [
        F.linear(part, getattr(module, f"weight{expert}"))
        for expert, part in enumerate(x.split(m_splits))
    ]
    return torch.cat(parts)


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Causal, ``[s, b, n, d]`` -> ``[s, b, n * d]``."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.permute(2, 0, 1, 3).flatten(2)


@contextmanager
def torch_kernels() -> Iterator[None]:
    """Let Transformer Engine's modules run forward passes on a CPU."""
    import transformer_engine.pytorch as te
    from megatron.core.transformer.moe import moe_utils

    instead = {
        te.Linear: _linear,
        te.LayerNormLinear: _norm_linear,
        te.GroupedLinear: _grouped,
        te.DotProductAttention: _attention,
        te.RMSNorm: _plain_norm,
        te.LayerNorm: _plain_norm,
    }
    with ExitStack() as stack:
        # The router's product: without Transformer Engine's Megatron takes torch's.
        stack.enter_context(mock.patch.object(moe_utils, "te_general_gemm", None))
        for owner, forward in instead.items():
            stack.enter_context(mock.patch.object(owner, "forward", forward))
        yield

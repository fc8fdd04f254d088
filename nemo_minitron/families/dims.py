"""The kinds of tensor dims, and how the indices of an axis become rows of a dim.

A dim is a sequence of parts, each of which gives every index of one axis a fixed number of
consecutive rows. Slicing, sharing out among ranks and the fusion of Hugging Face tensors all follow
from that description (docs/design/axes.md).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nemo_minitron.config.axes import AXES, axis_size
from nemo_minitron.config.model import ModelConfig

Run = tuple[int, int, int]
"""``(part, first row, one past the last row)``: consecutive rows of one part."""

FIXED: dict[str, Callable[[ModelConfig], int]] = {
    "vocab": lambda config: config.vocab_size,
    "position": lambda config: config.max_position_embeddings,
    "head_dim": lambda config: _head_dim(config),
    "mamba_state": lambda config: config.mamba_state_dim or 0,
    "mamba_conv_width": lambda config: 4,
    "q_lora": lambda config: config.q_lora_rank or 0,
    "kv_lora": lambda config: config.kv_lora_rank or 0,
    # Of multi-latent attention: the latent and the rotated key, which all heads share.
    "kv_latent": lambda config: config.cached_channels,
    "query_dim": lambda config: config.query_channels,
    "key_value_dim": lambda config: (config.qk_head_dim or 0) + config.kv_channels,
    "one": lambda config: 1,
    # Of a gated delta net.
    "linear_key_head": lambda config: config.linear_num_key_heads or 0,
    "linear_value_head": lambda config: config.linear_num_value_heads or 0,
    "linear_key_dim": lambda config: config.linear_key_head_dim or 0,
    "linear_value_dim": lambda config: config.linear_value_head_dim or 0,
    "linear_conv_width": lambda config: config.linear_conv_kernel_dim or 0,
}
"""Sizes that are never pruned, unless an axis has the same name."""


def _head_dim(config: Any) -> int:
    """Return channels of a head's output; latent attention has another name for them."""
    latent = getattr(config, "multi_latent_attention", False) and hasattr(config, "v_head_dim")
    return int(config.v_head_dim if latent else config.kv_channels)


def _size(config: ModelConfig, name: str) -> int:
    """Return the size of an axis, or a size in ``FIXED``."""
    fixed = FIXED.get(name)
    return axis_size(config, name) if fixed is None else fixed(config)


@dataclass(frozen=True)
class Part:
    """Rows that belong to one axis.

    Attributes:
        axis: name of the axis (``config.axes.AXES``), or of a size in ``FIXED``.
        inner: name of the axis, or of the size, that the rows of each of its indices are.
    """

    axis: str
    inner: str = "one"

    def count(self, config: ModelConfig) -> int:
        """Return indices of the axis."""
        return _size(config, self.axis)

    def rows(self, config: ModelConfig) -> int:
        """Return consecutive rows of each index."""
        return _size(config, self.inner)


@dataclass(frozen=True)
class Dim:
    """The content of one tensor dim, and its size.

    Attributes:
        parts: in the order of their rows, which is that of the Hugging Face tensors they come from.
        interleaved_by: without it the parts lie one after another. With it they lie once for each
            index of this axis (or size), each restricted to the rows that belong to that index:
            those of its children, or of the index itself.
    """

    parts: tuple[Part, ...]
    interleaved_by: str | None = None

    def size(self, config: ModelConfig) -> int:
        """Return the global size of the dim."""
        return sum(self.part_sizes(config))

    def part_sizes(self, config: ModelConfig) -> tuple[int, ...]:
        """Return rows of each part."""
        return tuple(part.count(config) * part.rows(config) for part in self.parts)

    @property
    def pruned_axes(self) -> tuple[str, ...]:
        """Axes whose indices decide which rows stay; empty for a dim that is never pruned."""
        names = (name for part in self.parts for name in (part.axis, part.inner))
        return tuple(name for name in names if name in AXES)

    def blocks(self, config: ModelConfig) -> tuple[int, ...]:
        """Return sizes of the blocks that tensor parallelism splits one by one."""
        sizes = self.part_sizes(config)
        return (sum(sizes),) if self.interleaved_by else sizes

    def repeats(self, config: ModelConfig) -> int:
        """Return how many times the sequence of parts lies in the dim."""
        return _size(config, self.interleaved_by) if self.interleaved_by else 1

    def runs(self, config: ModelConfig) -> Iterator[Run]:
        """Yield the rows of the parts in the order in which they lie in the dim."""
        repeats = self.repeats(config)
        for repeat in range(repeats):
            for number, size in enumerate(self.part_sizes(config)):
                step = size // repeats
                yield number, repeat * step, (repeat + 1) * step


_HEAD, _GROUP = Part("head", "head_dim"), Part("query_group", "head_dim")
_LINEAR_K = Part("linear_key_head", "linear_key_dim")
_LINEAR_V = Part("linear_value_head", "linear_value_dim")
_LINEAR_ONE = Part("linear_value_head")
_MAMBA_X, _MAMBA_B = Part("mamba_head", "mamba_head_dim"), Part("mamba_group", "mamba_state")


def _gate_up(axis: str) -> Dim:
    """Return the rows of the gate projection, then those of the up projection."""
    return Dim((Part(axis), Part(axis)))


DIMS: dict[str, Dim] = {
    **{name: Dim((Part(name),)) for name in FIXED},
    "hidden": Dim((Part("hidden"),)),
    "hidden_twice": Dim((Part("hidden"), Part("hidden"))),
    "ffn": Dim((Part("ffn"),)),
    "gate_up": _gate_up("ffn"),
    "head": Dim((_HEAD,)),
    "one_per_head": Dim((Part("head"),)),
    "query_group": Dim((_GROUP,)),
    # Megatron interleaves linear_qkv: per query group its query heads, its key, its value.
    "qkv": Dim((_HEAD, _GROUP, _GROUP), interleaved_by="query_group"),
    # The same where what heads put out is gated: queries, gates, key, value. Hugging Face has one
    # tensor of queries and gates, per head.
    "gated_qkv": Dim((_HEAD, _HEAD, _GROUP, _GROUP), interleaved_by="query_group"),
    "query_and_gate": Dim((_HEAD, _HEAD), interleaved_by="head"),
    "latent_query": Dim((Part("head", "query_dim"),)),
    "latent_key_value": Dim((Part("head", "key_value_dim"),)),
    "mamba_head": Dim((Part("mamba_head"),)),
    "mamba_inner": Dim((_MAMBA_X,)),
    # The projection z, x, B, C, dt of a Mamba layer, and the three of them that are convolved.
    "mamba_in": Dim((_MAMBA_X, _MAMBA_X, _MAMBA_B, _MAMBA_B, Part("mamba_head"))),
    "mamba_conv": Dim((_MAMBA_X, _MAMBA_B, _MAMBA_B)),
    # A gated delta net: queries, keys, values, gates, and of each value head how much is written
    # (beta) and how fast is forgotten (alpha). The first three are convolved.
    "linear_in": Dim((_LINEAR_K, _LINEAR_K, _LINEAR_V, _LINEAR_V, _LINEAR_ONE, _LINEAR_ONE)),
    "linear_conv": Dim((_LINEAR_K, _LINEAR_K, _LINEAR_V)),
    "linear_inner": Dim((_LINEAR_V,)),
    # Of Hugging Face's Qwen3-Next, per key head.
    "linear_qkvz": Dim(
        (_LINEAR_K, _LINEAR_K, _LINEAR_V, _LINEAR_V), interleaved_by="linear_key_head"
    ),
    "linear_ba": Dim((_LINEAR_ONE, _LINEAR_ONE), interleaved_by="linear_key_head"),
    "expert": Dim((Part("expert"),)),
    "expert_ffn": Dim((Part("expert_ffn"),)),
    "expert_gate_up": _gate_up("expert_ffn"),
    "shared_expert_ffn": Dim((Part("shared_expert_ffn"),)),
    "shared_expert_gate_up": _gate_up("shared_expert_ffn"),
}
"""Every dim by the name that parameter rows use."""

"""Points of a Megatron chunk at which a loss can read inner states.

``distillation/layer_map.py`` says what a place is. Hidden states are read at the norm that their
reader starts with (an identity in families without norms there), queries, keys and values as
attention reads them (after rotary embedding).
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.norms import final_norm, normed_input, norms_and_readers

States = tuple[Tensor, ...]
"""``(hidden [s, b, h],)`` or ``(query [s, b, n, d], key [s, b, g, d], value)``; local."""
Use = Callable[[States, Tensor], Tensor]
"""Called with the states and a tensor on the way to the loss; what it returns takes its place."""


def places_of(chunk: HiddenGPTModel) -> list[int]:
    """Return global 0-based layers of a chunk, and ``num_layers`` where the final norm is."""
    places = [int(layer.layer_number) - 1 for layer in chunk.decoder.layers]
    if final_norm(chunk) is not None:
        places.append(int(chunk.config.num_layers))
    return places


def watch(chunk: HiddenGPTModel, kind: str, place: int, use: Use) -> RemovableHandle:
    """Hook one place of a chunk.

    Args:
        chunk: a model chunk without wrappers that has the place.
        kind: one of ``INTERMEDIATE_LOSSES``.
        place: global place.
        use: sees the states of every forward pass.

    Returns:
        The handle that takes the hook away.
    """
    last = final_norm(chunk)
    if last is not None and place == chunk.config.num_layers:
        return _watch_norm(last, None, use)
    layer: Any = chunk.decoder.layers[places_of(chunk).index(place)]
    if kind == "attention_relation":
        return _watch_attention(layer.self_attention.core_attention, use)
    read = norms_and_readers(layer)
    norm, reader = read[-1] if kind == "mlp_input" else read[0]
    return _watch_norm(norm, reader, use)


def _watch_norm(norm: nn.Module, linear: nn.Module | None, use: Use) -> RemovableHandle:
    """Hook a norm, or the Transformer Engine linear layer that it is fused into."""

    def fused(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (use((normed_input(module, args[0]),), args[0]), *args[1:])

    def plain(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return use((output,), output)

    if linear is not None and getattr(linear, "layer_norm_weight", None) is not None:
        return linear.register_forward_pre_hook(fused)
    return norm.register_forward_hook(plain)


def _watch_attention(core: nn.Module, use: Use) -> RemovableHandle:
    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (use(args[:3], args[0]), *args[1:])

    return core.register_forward_pre_hook(before)

"""Sliding windows as config.json gives them, read as transformers reads them.

A window of ``w`` is the token itself and the ``w - 1`` before it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.config_json import words

WINDOW_KEYS = words("use_sliding_window sliding_window layer_types max_window_layers")
"""Keys of config.json that ``by_layer`` reads."""
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _width(hf: dict[str, Any]) -> int:
    """Return the window, or 0 without one, or where no position leaves it."""
    width = hf.get("sliding_window")
    if width is None or width >= hf["max_position_embeddings"]:
        return 0
    if width < 1:
        raise ValueError(
            f"config.json sliding_window={width} is not supported; only null, or at least 1"
        )
    return int(width)


def everywhere(hf: dict[str, Any]) -> list[int]:
    """Return windows of a network in which all layers have the same (Mistral, Mixtral, Phi-3).

    Args:
        hf: config.json with ``max_position_embeddings``, and ``sliding_window`` where the family
            has one by default.
    """
    return [_width(hf)] * int(hf["num_hidden_layers"])


def by_layer(hf: dict[str, Any], slides: Callable[[int], bool]) -> list[int]:
    """Return windows of a network whose layers differ (Qwen2, Qwen3, SmolLM3).

    Args:
        hf: config.json with ``max_position_embeddings``, and ``sliding_window`` where the family
            has one by default.
        slides: whether a layer has a window where ``layer_types`` does not say it.

    Raises:
        ValueError: ``layer_types`` holds other kinds, is of another number of layers, or has
            windows of which the width is not known.
    """
    layers = int(hf["num_hidden_layers"])
    known = bool(hf.get("use_sliding_window")) and hf.get("sliding_window") is not None
    kinds = hf.get("layer_types")
    if not kinds:
        kinds = [_SLIDING if known and slides(layer) else _FULL for layer in range(layers)]
    _check_kinds(kinds, layers)
    if _SLIDING in kinds and not known:
        raise ValueError(
            f"config.json layer_types holds '{_SLIDING}' with use_sliding_window="
            f"{str(hf.get('use_sliding_window', False)).lower()} and sliding_window="
            f"{hf.get('sliding_window')}, which transformers does not run; correct one of them in "
            "a copy of config.json"
        )
    return [_width(hf) if kind == _SLIDING else 0 for kind in kinds]


def by_pattern(hf: dict[str, Any], slides: Callable[[int], bool]) -> list[int]:
    """Windows of a network whose pattern does not depend on the width (Gemma, gpt-oss).

    Args:
        hf: as for ``by_layer``.
        slides: whether a layer has a window where ``layer_types`` does not say it.

    Raises:
        ValueError: see ``by_layer``; where a layer has a window, its width may not be null.
    """
    layers = range(int(hf["num_hidden_layers"]))
    kinds = hf.get("layer_types") or [_SLIDING if slides(layer) else _FULL for layer in layers]
    return by_layer({**hf, "use_sliding_window": True, "layer_types": kinds}, slides)


def _check_kinds(kinds: Sequence[str], layers: int) -> None:
    others = sorted(set(kinds) - {_FULL, _SLIDING})
    if others:
        raise ValueError(
            f"config.json layer_types holds {others}, not supported; only {_FULL} and {_SLIDING}"
        )
    if len(kinds) != layers:
        raise ValueError(
            f"config.json layer_types is of {len(kinds)} layers, but num_hidden_layers={layers}"
        )


def width_of(config: ModelConfig) -> int | None:
    """Return the window of the layers that have one, or None."""
    return max(config.window_size or [0]) or None


def stated_width(config: ModelConfig) -> int:
    """Return the ``sliding_window`` of which transformers makes a mask for any model.

    Its Gemma, Ministral and gpt-oss refuse null even where no layer has a window, so such a model
    states one that no position leaves.
    """
    return width_of(config) or config.max_position_embeddings


def layer_types(config: ModelConfig) -> list[str]:
    """Return ``layer_types`` of a config.json."""
    layers = config.window_size or [0] * config.num_layers
    return [_SLIDING if window else _FULL for window in layers]


def written(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json about windows that may differ between layers.

    Releases of transformers before ``layer_types`` go by ``max_window_layers``, the layers before
    the first window.
    """
    windows, width = config.window_size or [0] * config.num_layers, width_of(config)
    said: dict[str, Any] = {"use_sliding_window": width is not None, "sliding_window": width}
    if width is not None:
        said["max_window_layers"] = windows.index(width)
    if width is not None or config.hf.get("layer_types"):
        said["layer_types"] = layer_types(config)
    return said


def megatron_fields(config: ModelConfig) -> dict[str, Any]:
    """Return windows in the words of Megatron's configs; nothing for a model without any."""
    width = width_of(config)
    if width is None:
        return {}
    return {
        "window_size": (width - 1, 0),
        "window_attn_skip_freq": [int(window > 0) for window in config.window_size or []],
    }

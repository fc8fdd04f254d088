"""Pictures of the report: matplotlib figures as PNG data URIs, for light and for dark pages."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

_WIDTH = 5.2  # inches: at phone width the text of a wider figure would be too small to read
_DPI = 160
_MARKS_UP_TO = 64  # heads: more marks than this cannot be told apart
_LAYER = "layer (counted from 1)"
_LIGHT = {"text": "#1f2328", "grid": "#d5d9de", "page": "#ffffff"}
_DARK = {"text": "#e6e9ed", "grid": "#3d444d", "page": "#161a1f"}
# Told apart by all common kinds of colour vision, and legible on both pages.
_KEPT, _DROPPED, _OTHER = "#4a90d9", "#e0812f", "#2ba58c"
_COLOURS = "viridis"


Record = Mapping[str, Any]  # a candidate of a search, or a step of a training, read from JSON


@dataclass(frozen=True)
class Picture:
    """A figure in both colour schemes; ``light`` and ``dark`` are ``data:`` URIs."""

    light: str
    dark: str
    caption: str
    alt: str


def _picture(draw: Callable[["Figure"], None], height: float, caption: str, alt: str) -> Picture:
    light, dark = (_png(draw, height, scheme) for scheme in (_LIGHT, _DARK))
    return Picture(light, dark, caption, alt)


def _png(draw: Callable[["Figure"], None], height: float, scheme: dict[str, str]) -> str:
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot: no global state, always Agg

    style = {
        "font.size": 10,
        "figure.facecolor": scheme["page"],
        "axes.facecolor": scheme["page"],
        "axes.edgecolor": scheme["grid"],
        "axes.labelcolor": scheme["text"],
        "axes.titlecolor": scheme["text"],
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": scheme["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "text.color": scheme["text"],
        "xtick.color": scheme["text"],
        "ytick.color": scheme["text"],
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _layer_axis(axis: "Axis", layers: int) -> None:
    """Label an axis with layer numbers, counted from 1 as in ``pruning.drop_layers``."""
    step = max(1, -(-layers // 10))
    ticks = np.arange(0, layers, step)
    axis.set_ticks(ticks, [str(tick + 1) for tick in ticks])


def _image(figure: "Figure", values: np.ndarray, label: str, extent: Sequence[float]) -> "Axes":
    """Draw a heat map with a log colour scale, layers from top to bottom."""
    from matplotlib.colors import LogNorm

    axes = figure.subplots()
    positive = values[values > 0]
    # A few outliers would otherwise take the whole scale.
    low, high = np.percentile(positive, [0.5, 99.5]) if positive.size else (0.5, 1.0)
    norm = LogNorm(low, max(high, low * (1 + 1e-6)))
    drawn = axes.imshow(
        np.clip(values, norm.vmin, None),
        aspect="auto",
        cmap=_COLOURS,
        norm=norm,
        extent=(extent[0], extent[1], len(values) - 0.5, -0.5),
    )
    figure.colorbar(drawn, ax=axes, label=label, pad=0.02, extend="both")
    axes.set_ylabel(_LAYER)
    _layer_axis(axes.yaxis, len(values))
    return axes


def _mark_cut(axes: "Axes", kept: int | None, size: int) -> None:
    """Draw a line behind what stays, where anything was pruned."""
    if kept is not None and kept < size:
        axes.axvline(kept, color=_DROPPED, linewidth=1.8)
        axes.set_title(f"{kept} of {size} kept (left of the line)")


def png_bytes(picture: Picture) -> bytes:
    """Return the picture in light colours as a PNG file."""
    return base64.b64decode(picture.light.partition(",")[2])


def search_front(records: Sequence[Record]) -> Picture:
    """Quality of the candidates of a search against parameters and latency.

    Args:
        records: as in ``candidates.json``.
    """
    from nemo_minitron.search import objective, pareto_front

    distilled = np.array([r["distilled_loss"] is not None for r in records], dtype=bool)
    found = np.array([objective(record) for record in records])
    tasks = any(record.get("score") is not None for record in records)
    shown, what = (-found, "score of the tasks") if tasks else (found, "LM loss")
    panels = (("parameters, millions", "parameters", 1e-6), ("ms per sample", "latency_ms", 1.0))

    def draw(figure: "Figure") -> None:
        drawn = figure.subplots(1, 2, sharey=True)
        for axes, (label, key, scale) in zip(drawn, panels, strict=True):
            costs = np.array([record[key] * scale for record in records])
            for chosen, marker in ((distilled, "D"), (~distilled, "o")):
                axes.scatter(costs[chosen], shown[chosen], marker=marker, color=_KEPT)
            front = pareto_front(list(zip(costs.tolist(), found.tolist(), strict=True)))
            axes.step(costs[front], shown[front], color=_DROPPED, where="post")
            axes.set_xlabel(label)
            axes.grid()
        drawn[0].set_ylabel(what)
        drawn[0].set_title("diamonds: after a short distillation" if distilled.any() else "")

    return _picture(
        draw,
        3.0,
        "Candidates of the search; the line joins those that none beats in both.",
        f"{what} of {len(records)} candidates against parameters and latency.",
    )


def ffn_heat_map(ffn: np.ndarray, kept: int | None) -> Picture:
    """Draw the FFN neurons of each layer, most important first.

    Args:
        ffn: scores ``[layers, f]``.
        kept: neurons each layer keeps; None when nothing was pruned with these scores.
    """
    ordered = -np.sort(-ffn.astype(np.float64), axis=1)
    relative = ordered / np.maximum(ordered.mean(axis=1, keepdims=True), 1e-30)
    size = ffn.shape[1]

    def draw(figure: "Figure") -> None:
        axes = _image(figure, relative, "score / mean of the layer", (0, size))
        axes.set_xlabel("FFN neurons, most important first")
        _mark_cut(axes, kept, size)

    return _picture(
        draw,
        3.4,
        "FFN importance: every row is a layer, its neurons sorted by score.",
        f"Heat map of FFN importance, {len(ffn)} layers by {size} neurons.",
    )


def head_heat_map(head: np.ndarray, kept: dict[int, set[int]] | None) -> Picture:
    """Draw the query heads of each layer, in their own order; a cross marks what is dropped.

    Args:
        head: scores ``[layers, n]``.
        kept: layer (0-based) -> kept heads, kept layers only; None when nothing was pruned.
    """
    layers, heads = head.shape

    def draw(figure: "Figure") -> None:
        axes = _image(figure, head, "score", (-0.5, heads - 0.5))
        axes.set_xlabel("query head (counted from 1)")
        _layer_axis(axes.xaxis, heads)
        if kept is not None and heads <= _MARKS_UP_TO:
            gone = [
                (index, layer)
                for layer in range(layers)
                for index in range(heads)
                if index not in kept.get(layer, ())
            ]
            if gone:
                x, y = zip(*gone, strict=True)
                axes.scatter(x, y, marker="x", s=14, color=_DROPPED, lw=1.2)
                axes.set_title("crosses: dropped heads")

    return _picture(
        draw,
        3.4,
        "Attention head importance.",
        f"Heat map of head importance, {layers} layers by {heads} heads.",
    )


def layer_bars(layer: np.ndarray, kept: Sequence[int] | None) -> Picture:
    """Return block influence of each layer.

    Args:
        layer: scores ``[layers]``.
        kept: layers (0-based) that stay; None when nothing was pruned with these scores.
    """
    stays = set(range(len(layer)) if kept is None else kept)
    colours = [_KEPT if index in stays else _DROPPED for index in range(len(layer))]

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.bar(np.arange(len(layer)), layer, color=colours)
        axes.grid(axis="y")
        axes.set_xlabel(_LAYER)
        axes.set_ylabel("block influence")
        _layer_axis(axes.xaxis, len(layer))
        if layer.min() > 0 and layer.max() > 30 * layer.min():
            axes.set_yscale("log")
        if len(stays) < len(layer):
            axes.set_title("orange: dropped layers")

    return _picture(
        draw,
        2.4,
        "Layer importance (1 - cosine between what enters and what leaves a layer).",
        f"Bars of the importance of {len(layer)} layers.",
    )


def hidden_curve(hidden: np.ndarray, kept: int | None) -> Picture:
    """Draw the hidden channels, most important first.

    Args:
        hidden: scores ``[h]``.
        kept: channels that stay; None when nothing was pruned with these scores.
    """
    ordered = -np.sort(-hidden)

    def draw(figure: "Figure") -> None:
        axes = figure.subplots()
        axes.plot(np.arange(1, len(hidden) + 1), ordered, color=_KEPT)
        axes.grid()
        axes.set_xlabel("hidden channels, most important first")
        axes.set_ylabel("score")
        if ordered[-1] > 0:
            axes.set_yscale("log")
        _mark_cut(axes, kept, len(hidden))

    return _picture(
        draw,
        2.4,
        "Hidden channel importance, summed over all norms.",
        f"Sorted scores of {len(hidden)} hidden channels.",
    )


def kept_sizes(kept: dict[str, tuple[int, dict[int, int]]], layers: int) -> Picture:
    """Draw the size that every layer of the original model keeps.

    Args:
        kept: axis label -> size before pruning, and layer (0-based, of the original model) -> size
            kept; a dropped layer is not in it.
        layers: layers before pruning.
    """

    def draw(figure: "Figure") -> None:
        panels = figure.subplots(len(kept), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, (size, stays)) in zip(panels, kept.items(), strict=True):
            gone = [index for index in range(layers) if index not in stays]
            axes.bar(range(layers), [size] * layers, color="none", edgecolor="#8b949e", lw=0.6)
            axes.bar(list(stays), list(stays.values()), color=_KEPT)
            if gone:
                axes.plot(gone, [size / 2] * len(gone), "x", color=_DROPPED, ms=5)
            axes.set_title(_kept_title(label, size, stays, gone))
            axes.set_ylim(0, size * 1.05)
        _layer_axis(panels[-1].xaxis, layers)
        panels[-1].set_xlabel(_LAYER)

    return _picture(
        draw,
        0.5 + 1.15 * len(kept),
        "Kept sizes per layer of the original model (outline: before).",
        "; ".join(
            f"{label}: {sorted(set(stays.values()))} of {size}"
            for label, (size, stays) in kept.items()
        ),
    )


def _kept_title(label: str, size: int, stays: dict[int, int], gone: list[int]) -> str:
    counts = sorted(set(stays.values()))
    span = str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    cross = f"; {len(gone)} layers dropped (x)" if gone else ""
    return f"{label}: {span} of {size}{cross}"


def training_curve(history: Sequence[Record]) -> Picture:
    """Draw losses, of which there is at least one, and learning rate over optimizer steps.

    Args:
        history: items with ``step`` and any of ``loss``, ``val_kd_loss``, ``val_loss`` and ``lr``.
    """
    from matplotlib.ticker import MaxNLocator

    panels = [
        (title, lines)
        for title, lines in (
            ("training loss (dots: distillation loss, validation)", ("loss", "val_kd_loss")),
            ("language-model loss, validation", ("val_loss",)),
            ("learning rate", ("lr",)),
        )
        if any(_points(history, key)[0] for key in lines)
    ]
    styles: dict[str, dict[str, Any]] = {
        "loss": {"color": _KEPT},
        "val_kd_loss": {"color": _DROPPED, "marker": "o", "ls": "none", "ms": 5},
        "val_loss": {"color": _DROPPED, "marker": "o", "ms": 5},
        "lr": {"color": _OTHER},
    }

    def draw(figure: "Figure") -> None:
        drawn = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        drawn[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes, (title, lines) in zip(drawn, panels, strict=True):
            for key in lines:
                axes.plot(*_points(history, key), **styles[key])
            axes.set_title(title)
            axes.grid()
        drawn[-1].set_xlabel("optimizer step")

    return _picture(
        draw,
        0.6 + 1.5 * len(panels),
        "Losses and learning rate over optimizer steps.",
        "Curves of " + ", ".join(title for title, _ in panels),
    )


def _points(history: Sequence[Record], key: str) -> tuple[list[int], list[float]]:
    found = [(item["step"], item[key]) for item in history if item.get(key) is not None]
    return [step for step, _ in found], [value for _, value in found]

"""Tables of what ``generate`` and ``benchmark`` measured, from their ``metrics.json``."""

from collections.abc import Mapping
from typing import Any

Figures = Mapping[str, Any]
"""A ``metrics.json``, or a part of one."""


def generation_rows(metrics: Figures) -> list[tuple[str, str]]:
    """Name and figure, of one result of ``generate``."""
    rows = [
        ("prompts", f"{metrics['prompts']:,}"),
        ("samples", f"{metrics['samples']:,}"),
        ("of them ended", f"{metrics['ended']:,}"),
        *((f"dropped by {key}", f"{count:,}") for key, count in metrics["dropped"].items()),
        ("kept", f"{metrics['kept']:,}"),
        ("new tokens kept", f"{metrics['kept_tokens']:,}"),
        ("tokens/s", f"{metrics['tokens_per_second']:,.0f}"),
    ]
    return rows


SPEED_HEADER = (
    "model",
    "batch",
    "prefill tokens/s",
    "decode tokens/s",
    "to the first",
    "first token",
    "next token",
    "weights GB",
    "KV cache GB",
    "peak GB",
)


def speed_rows(metrics: Figures) -> list[tuple[str, ...]]:
    """Rows of ``SPEED_HEADER`` of one result of ``benchmark``: equal batches, then largest ones."""
    models = metrics["models"]
    return [
        _speed_row(model, model[name], models[0][name], name)
        for name in ("equal", "largest")
        if name in models[0]
        for model in models
    ]


def _speed_row(model: Figures, found: Figures, first: Figures, name: str) -> tuple[str, ...]:
    decode = found["decode_tokens_per_second"]
    memory = found["memory"]
    return (
        model["label"],
        f"{found['batch_size']}" + (" (largest)" if name == "largest" else ""),
        _spread(found["prefill_tokens_per_second"]),
        _spread(decode),
        f"{decode['median'] / first['decode_tokens_per_second']['median']:.2f}x",
        *(
            f"{found[key]['median'] * 1e3:,.1f} ms"
            for key in ("first_token_seconds", "token_seconds")
        ),
        *(
            "-" if memory[key] is None else f"{memory[key] / 1e9:.3g}"
            for key in ("weights", "kv_cache", "peak")
        ),
    )


def _spread(figure: Mapping[str, float]) -> str:
    """Return the median, and the lowest and highest in brackets."""
    return f"{figure['median']:,.0f} ({figure['low']:,.0f}-{figure['high']:,.0f})"

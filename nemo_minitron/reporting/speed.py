"""Tables of what ``generate`` counted, from its ``metrics.json``."""

from collections.abc import Mapping
from typing import Any


def generation_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
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

"""Jinja2 templates of this package."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment


def templates(**settings: Any) -> "Environment":
    """The templates below ``templates/``; a value that is missing is an error.

    Args:
        settings: further ones of ``jinja2.Environment``.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("nemo_minitron.reporting"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        **settings,
    )

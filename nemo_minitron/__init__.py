"""Minitron compression (importance, pruning, distillation) for NeMo and Megatron-Core.

The names of ``docs/api.md`` are imported when they are used, so that ``import nemo_minitron`` is
light; ``__init__.pyi`` says what they are.
"""

import importlib

__version__ = "0.1.0"

_PLACES = {
    "Distillation": "nemo_minitron.models.in_schedule",
    "DistillationConfig": "nemo_minitron.config.distillation",
    "ParallelConfig": "nemo_minitron.config.parallel",
    "Plan": "nemo_minitron.pruning.plan",
    "Scores": "nemo_minitron.pruning.scores",
    "export": "nemo_minitron.api",
    "make_plan": "nemo_minitron.api",
    "open_model": "nemo_minitron.api",
    "prune": "nemo_minitron.api",
    "prune_checkpoint": "nemo_minitron.api",
    "score": "nemo_minitron.api",
}
__all__ = [*_PLACES, "__version__"]


def __getattr__(name: str) -> object:
    """Import a public name."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(_PLACES[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return public names, imported or not."""
    return sorted({*globals(), *_PLACES})

"""Minitron compression (importance, pruning, distillation) for NeMo and Megatron-Core."""

__version__ = "0.1.0"

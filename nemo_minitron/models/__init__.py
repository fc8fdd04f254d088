"""Megatron-Core models and the NeMo classes around them."""

from nemo_minitron.runtime import quiet

quiet.before_imports()

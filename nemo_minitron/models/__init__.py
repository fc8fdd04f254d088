"""Megatron-Core models and the NeMo classes around them."""

from nemo_minitron.runtime.extensions import before_megatron

before_megatron()

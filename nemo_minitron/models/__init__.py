"""Megatron-Core models and the NeMo classes around them."""

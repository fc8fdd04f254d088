"""Checkpoints that Megatron-LM, Megatron-Bridge, NeMo 1 and NeMo 2 wrote."""

"""Tokens: documents -> Megatron indexed dataset -> samples -> batches of a data-parallel rank."""

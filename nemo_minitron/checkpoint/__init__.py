"""Weights on disk: Megatron ``torch_dist``, Hugging Face and GGUF, read and written lazily."""

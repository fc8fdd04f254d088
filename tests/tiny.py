"""Small models and token batches that tests share."""

import torch

from nemo_minitron.config.model import ModelConfig

LLAMA = ModelConfig(
    family="llama",
    num_layers=4,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=8,
    num_query_groups=4,
    kv_channels=12,
    vocab_size=101,
    max_position_embeddings=128,
)


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Global tensors of a random model, keyed by Megatron name (local spec)."""
    from nemo_minitron.families.registry import family_of

    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, row, _ in family_of(config).parameters(config):
        tensor = torch.randn(row.shape(config), generator=generator) * 0.2
        if "layernorm" in name and name.endswith("weight"):
            tensor = tensor + 1.0
        out[name] = tensor
    return out


def token_batch(samples: int, seq_length: int, vocab_size: int, seed: int = 0) -> torch.Tensor:
    """``[samples, seq_length + 1]`` random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocab_size, (samples, seq_length + 1), generator=generator)

"""Hooks on layers whose norms stand alone (local spec) or are fused (Transformer Engine)."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_minitron.config.stages import ScoreConfig

H, FFN, HEADS, D, LAYERS = 12, 20, 3, 4, 2


@dataclass
class Config:
    """The fields of Megatron's TransformerConfig that the layers below and the hooks read."""

    normalization: str
    layernorm_zero_centered_gamma: bool
    num_layers: int = LAYERS
    hidden_size: int = H
    ffn_hidden_size: int = FFN
    num_attention_heads: int = HEADS
    kv_channels: int = D
    num_moe_experts: int | None = None
    moe_layer_freq: int = 1
    moe_shared_expert_intermediate_size: int | None = None
    sequence_parallel: bool = False
    layernorm_epsilon: float = 1e-5


def normalise(x: Tensor, weight: Tensor, bias: Tensor | None, config: Config) -> Tensor:
    """By the definition, not by torch's functions."""
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if config.normalization == "RMSNorm":
        return x / (x.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + config.layernorm_epsilon).sqrt()
    assert bias is not None
    return centred / scale * weight + bias


class Norm(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.randn(H))
        self.bias = nn.Parameter(torch.randn(H)) if config.normalization == "LayerNorm" else None

    def forward(self, x: Tensor) -> Tensor:
        return normalise(x, self.weight, self.bias, self.config)


class FusedNormLinear(nn.Module):
    """The contract of ``TELayerNormColumnParallelLinear``: names, config and call."""

    def __init__(self, norm: Norm, linear: nn.Linear) -> None:
        super().__init__()
        self.config = norm.config
        self.layer_norm_weight = norm.weight
        if norm.bias is not None:
            self.layer_norm_bias = norm.bias
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        bias = getattr(self, "layer_norm_bias", None)
        return F.linear(normalise(x, self.layer_norm_weight, bias, self.config), self.weight)


class Layer(nn.Module):
    def __init__(self, number: int, config: Config) -> None:
        super().__init__()
        self.layer_number = number
        self.input_layernorm: Any = Norm(config)
        self.pre_mlp_layernorm: Any = Norm(config)
        self.self_attention: Any = nn.Module()
        self.self_attention.linear_qkv = nn.Linear(H, HEADS * D, bias=False)
        self.self_attention.linear_proj = nn.Linear(HEADS * D, H)
        self.mlp: Any = nn.Module()
        self.mlp.linear_fc1 = nn.Linear(H, FFN, bias=False)
        self.mlp.linear_fc2 = nn.Linear(FFN, H)

    def fuse(self) -> None:
        self.self_attention.linear_qkv = FusedNormLinear(
            self.input_layernorm, self.self_attention.linear_qkv
        )
        self.mlp.linear_fc1 = FusedNormLinear(self.pre_mlp_layernorm, self.mlp.linear_fc1)
        self.input_layernorm = nn.Identity()
        self.pre_mlp_layernorm = nn.Identity()

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        attention = self.self_attention.linear_qkv(self.input_layernorm(hidden_states))
        x = hidden_states + self.self_attention.linear_proj(attention)
        mlp = F.gelu(self.mlp.linear_fc1(self.pre_mlp_layernorm(x)))
        return x + self.mlp.linear_fc2(mlp), None


class Chunk(nn.Module):
    def __init__(self, config: Config) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = config
        self.decoder: Any = nn.Module()
        self.decoder.layers = nn.ModuleList(Layer(i + 1, config) for i in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.decoder.layers:
            x, _ = layer(hidden_states=x)
        return x


def groups() -> Any:
    one = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    return SimpleNamespace(tp=one, cp=one)


def scores(chunk: Chunk) -> dict[str, Tensor]:
    from nemo_minitron.importance.hooks import record

    torch.manual_seed(1)
    with record([chunk], groups(), ScoreConfig(), lambda k: 2) as (recorder,):
        for _ in range(3):
            chunk(torch.randn(5, 2, H))
    found = {axis: acc.scores() for axis, acc in recorder.channels.items()}
    assert recorder.influence is not None
    return {**found, "layer": recorder.influence.scores()}


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("zero_centered", [False, True])
def test_fused_norms_score_as_norms_that_stand_alone(normalization, zero_centered) -> None:
    config = Config(normalization, zero_centered)
    local, fused = Chunk(config), Chunk(config)
    for layer in fused.decoder.layers:
        layer.fuse()
    expected, found = scores(local), scores(fused)
    assert expected["hidden"].shape == (2 * LAYERS, H)
    for axis, tensor in expected.items():
        torch.testing.assert_close(found[axis], tensor, rtol=1e-5, atol=0)


def test_heads_of_latent_attention_are_as_wide_as_their_values() -> None:
    """Megatron's configuration of it has ``kv_channels`` too, which nothing of it goes by."""
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    from nemo_minitron.config.axes import AXES
    from nemo_minitron.importance.hooks import rows_seen

    sizes = {"num_layers": LAYERS, "hidden_size": H, "num_attention_heads": HEADS}
    for kv_channels in (None, 16):
        latent = MLATransformerConfig(
            **sizes, kv_channels=kv_channels, qk_head_dim=6, qk_pos_emb_head_dim=2, v_head_dim=5
        )
        assert latent.kv_channels == (kv_channels or H // HEADS)
        assert rows_seen(AXES["head"], latent) == (0, HEADS * 5)
        plain = TransformerConfig(**sizes, kv_channels=kv_channels)
        assert rows_seen(AXES["head"], plain) == (0, HEADS * plain.kv_channels)


def hook_count(chunk: Chunk) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in chunk.modules())


def test_hooks_go_away_when_the_forward_fails() -> None:
    from nemo_minitron.importance.hooks import record

    chunk = Chunk(Config("RMSNorm", False))
    chunk.decoder.layers[1].mlp.linear_fc2 = nn.Linear(FFN + 1, H)
    with record([chunk], groups(), ScoreConfig(), lambda k: 1):
        assert hook_count(chunk) == 2 + 5 * LAYERS
        with pytest.raises(RuntimeError):
            chunk(torch.randn(5, 1, H))
        assert hook_count(chunk) == 2 + 5 * LAYERS
    assert hook_count(chunk) == 0


def test_hooks_go_away_when_the_body_fails() -> None:
    from nemo_minitron.importance.hooks import record

    chunk = Chunk(Config("RMSNorm", False))
    context = record([chunk], groups(), ScoreConfig(), lambda k: 1)
    context.__enter__()
    error = RuntimeError("stopped")
    assert not context.__exit__(RuntimeError, error, None)
    assert hook_count(chunk) == 0


def test_a_layer_that_cannot_be_scored_is_named_and_leaves_no_hooks() -> None:
    from nemo_minitron.importance.hooks import record

    chunk = Chunk(Config("RMSNorm", False))
    del chunk.decoder.layers[1].mlp.linear_fc2
    with (
        pytest.raises(ValueError, match=r"layer 2 .*leave ffn out of scores\.axes"),
        record([chunk], groups(), ScoreConfig(), lambda k: 1),
    ):
        pass
    assert hook_count(chunk) == 0

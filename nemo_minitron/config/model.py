"""The architecture of one model, as stored in ``model.yaml`` beside its weights."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from nemo_minitron.config.layers import (
    MLP,
    OPTIONAL,
    PER_LAYER,
    check_lengths,
    check_pattern,
    entries_of,
    kinds_of,
)
from nemo_minitron.config.model_checks import (
    check_experts,
    check_latent,
    check_linear,
    check_mamba,
    check_numbers,
    check_prediction,
)
from nemo_minitron.documents import read_yaml_mapping

MODEL_YAML = "model.yaml"


@dataclass(kw_only=True)
class ModelConfig:
    """Sizes and switches of a GPT model, named as Megatron-Core names them.

    All sizes are global (of the whole model). ``vocab_size`` is the true vocabulary: padding to a
    multiple of the tensor-parallel size is added when a model is built and never stored.
    """

    family: str
    """Name of the parameter table in ``nemo_minitron/families``."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    """Head dim. Independent of ``hidden_size / num_attention_heads``. In multi-latent attention it
    is that of the values (Megatron's ``v_head_dim``)."""
    vocab_size: int
    max_position_embeddings: int
    normalization: str = "RMSNorm"
    layernorm_epsilon: float = 1e-5
    layernorm_zero_centered_gamma: bool = False
    """Whether norms multiply by 1 + weight (Megatron's ``apply_layernorm_1p``)."""
    gated_linear_unit: bool = True
    activation: str = "silu"
    """``silu``, ``gelu``, ``gelu_tanh``, ``quick_gelu`` or ``squared_relu``."""
    activation_func_clamp_value: float | None = field(default=None, metadata=OPTIONAL)
    """Clamp of a gated MLP: neither the gate nor the size of what it multiplies exceeds this."""
    glu_linear_offset: float = field(default=0.0, metadata=OPTIONAL)
    """Constant that a gated MLP adds to what the gate multiplies."""
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    qk_layernorm: bool = False
    position_embedding_type: str = "rope"
    """``rope``, ``learned_absolute`` (a table of ``max_position_embeddings`` rows) or ``none``."""
    rotary_base: float = 10000.0
    rotary_percent: float = 1.0
    rope_scaling: dict[str, Any] | None = None
    """The Hugging Face ``rope_scaling`` dictionary with every value of its kind, or None."""
    no_rope_freq: list[int] | None = field(default=None, metadata=PER_LAYER)
    """One entry per layer: 1 if its queries and keys are not rotated, else 0. None if all are."""
    window_size: list[int] | None = field(default=None, metadata=PER_LAYER)
    """One entry per layer: tokens that a query sees, itself and those before it, or 0 if it sees
    all of them. None if every layer sees all."""
    multipliers: dict[str, float] | None = field(default=None, metadata=OPTIONAL)
    """What multiplies the embeddings (``embedding``), the scores of attention (``attention``, in
    place of ``kv_channels ** -0.5``) and what each block adds (``residual``), and what divides the
    logits (``logits``). None of a network without such numbers."""
    apply_embedding_scaling: bool = field(default=False, metadata=OPTIONAL)
    """Embeddings are multiplied by ``hidden_size ** 0.5``, rounded to the dtype of the weights."""
    attn_logit_softcapping: float | None = field(default=None, metadata=OPTIONAL)
    """What no score of attention exceeds: ``cap * tanh(score / cap)`` takes its place."""
    final_logit_softcapping: float | None = field(default=None, metadata=OPTIONAL)
    """What no logit exceeds: ``cap * tanh(logit / cap)`` takes its place."""
    rotary_base_local: float | None = field(default=None, metadata=OPTIONAL)
    """``rotary_base`` of the layers with a window, which are not scaled; None if it is the same."""
    share_embeddings_and_output_weights: bool = False
    """Whether input and output embeddings are one matrix (tied)."""
    num_moe_experts: int | None = None
    """Number of experts in every layer that has them, or None for a dense model."""
    moe_ffn_hidden_size: int | None = None
    """FFN width of each expert."""
    moe_router_topk: int = 2
    """Number of experts that each token is routed to."""
    moe_router_pre_softmax: bool = False
    """Softmax over all experts before some are picked, else over the picked ones."""
    moe_shared_expert_intermediate_size: int | None = None
    """FFN width of the expert that every token goes through, or None without such an expert."""
    moe_shared_expert_gate: bool = False
    """Multiplies the shared expert's output by the sigmoid of a learned gate."""
    moe_router_score_function: str = field(default="softmax", metadata=OPTIONAL)
    """What makes an expert's weight of the router's output: ``softmax`` or ``sigmoid``."""
    moe_router_enable_expert_bias: bool = field(default=False, metadata=OPTIONAL)
    """A bias that is added to the scores by which experts are picked, not to their weights."""
    moe_router_topk_scaling_factor: float | None = field(default=None, metadata=OPTIONAL)
    """Factor of the weights of the picked experts."""
    moe_router_num_groups: int | None = field(default=None, metadata=OPTIONAL)
    """Groups of experts, the best ``moe_router_group_topk`` of which are picked from."""
    moe_router_group_topk: int | None = field(default=None, metadata=OPTIONAL)
    """Groups of experts that each token may be routed to."""
    moe_layer_freq: list[int] | None = field(default=None, metadata=PER_LAYER)
    """One entry per layer of a GPT model with experts: 1 if it has them, 0 if it has an MLP of
    ``ffn_hidden_size`` in their place. None if all layers are alike."""
    hybrid_layer_pattern: str | None = field(default=None, metadata=PER_LAYER)
    """One letter per layer of a hybrid model: ``M`` Mamba-2, ``*`` attention, ``-`` MLP, ``E``
    experts. None for a GPT model, whose layers are attention and then an MLP or experts."""
    mamba_num_heads: int | None = field(default=None, metadata=OPTIONAL)
    """Number of heads of every Mamba-2 layer."""
    mamba_head_dim: int | None = field(default=None, metadata=OPTIONAL)
    """Channels of each head of a Mamba-2 layer."""
    mamba_num_groups: int | None = field(default=None, metadata=OPTIONAL)
    """Groups of Mamba-2 heads, each with an input and an output matrix (B and C) of its own."""
    mamba_state_dim: int | None = field(default=None, metadata=OPTIONAL)
    """Size of the state that each channel of a Mamba-2 head has."""
    linear_attention_freq: list[int] | None = field(default=None, metadata=PER_LAYER)
    """One entry per layer of a GPT model: 1 if it has a gated delta net, a linear attention, in
    place of attention, else 0. None if no layer has one."""
    linear_num_key_heads: int | None = field(default=None, metadata=OPTIONAL)
    """Heads of queries and keys in every gated delta net."""
    linear_num_value_heads: int | None = field(default=None, metadata=OPTIONAL)
    """Heads of values in every gated delta net, each with its own state, gate and decay."""
    linear_key_head_dim: int | None = field(default=None, metadata=OPTIONAL)
    """Channels of a head of queries or keys of a gated delta net."""
    linear_value_head_dim: int | None = field(default=None, metadata=OPTIONAL)
    """Channels of a head of values of a gated delta net."""
    linear_conv_kernel_dim: int | None = field(default=None, metadata=OPTIONAL)
    """Tokens that the convolution of a gated delta net sees: a token and those before it."""
    attention_output_gate: bool = field(default=False, metadata=OPTIONAL)
    """What the heads of attention put out is multiplied by the sigmoid of a gate of each channel,
    whose rows come after those of the queries of a group."""
    kv_lora_rank: int | None = field(default=None, metadata=OPTIONAL)
    """Size of the latent that keys and values are made of in multi-latent attention (MLA), or None
    of a network without it."""
    q_lora_rank: int | None = field(default=None, metadata=OPTIONAL)
    """Size of the latent that MLA makes queries of; None where it makes them of the input."""
    qk_head_dim: int | None = field(default=None, metadata=OPTIONAL)
    """Channels of a query or key head that MLA does not rotate."""
    qk_pos_emb_head_dim: int | None = field(default=None, metadata=OPTIONAL)
    """Channels of a query head that MLA rotates; all heads share those of the key."""
    mtp_num_layers: int | None = field(default=None, metadata=OPTIONAL)
    """Layers for multi-token prediction after the last layer, each like it inside; None without."""
    dtype: str = "float32"
    """Storage dtype of the weights: ``float32``, ``bfloat16`` or ``float16``."""
    kept_layers: list[int] = field(default_factory=list)
    """Indices (0-based) of this model's layers in the original one; empty if none was dropped."""
    hf: dict[str, Any] = field(default_factory=dict)
    """Fields of the source ``config.json`` that do not change with size (token ids, rope, ...)."""

    def __post_init__(self) -> None:
        """Check the relations every model must satisfy."""
        check_numbers(self)
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_query_groups={self.num_query_groups}"
            )
        if self.hybrid_layer_pattern is not None:
            check_pattern(self.hybrid_layer_pattern)
            check_mamba(self)
        check_lengths(self)
        if not any(self.no_rope_freq or []):
            self.no_rope_freq = None  # one way to say that every layer rotates
        if not any(self.window_size or []):
            self.window_size = None
        if all(self.moe_layer_freq or []):
            self.moe_layer_freq = None
        widths = sorted(set(self.window_size or []) - {0})
        if len(widths) > 1 or min(widths, default=1) < 1:
            raise ValueError(
                f"window_size={self.window_size} is not supported; only one number above 0, and 0 "
                "in layers that see everything"
            )
        check_linear(self)
        check_latent(self)
        check_prediction(self)
        check_experts(self)

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def swiglu(self) -> bool:
        """Whether the MLP is SwiGLU, for which Megatron has a function of its own."""
        return self.gated_linear_unit and self.activation == "silu"

    @property
    def multi_latent(self) -> bool:
        """Whether keys and values of all heads are made of one small latent (MLA)."""
        return self.kv_lora_rank is not None

    @property
    def query_channels(self) -> int:
        """Channels of a query head and of a key head."""
        if not self.multi_latent:
            return self.kv_channels
        return (self.qk_head_dim or 0) + (self.qk_pos_emb_head_dim or 0)

    @property
    def cached_channels(self) -> int:
        """Numbers that a layer of attention has to keep of every token to write on."""
        if not self.multi_latent:
            return 2 * self.num_query_groups * self.kv_channels
        return (self.kv_lora_rank or 0) + (self.qk_pos_emb_head_dim or 0)

    @property
    def stacked_layers(self) -> bool:
        """Whether checkpoints hold a parameter of all layers under one key.

        Megatron-Core does so where every layer has the same parameters.
        """
        differ = (self.hybrid_layer_pattern, self.moe_layer_freq, self.linear_attention_freq)
        return all(entries is None for entries in differ)

    @property
    def max_seq_length(self) -> int | None:
        """Longest sequence the model has positions for, or None if any length is possible."""
        learned = self.position_embedding_type == "learned_absolute"
        # Up to that length nothing is scaled; beyond, the scaling would change with every token.
        dynamic = (self.rope_scaling or {}).get("rope_type") == "dynamic"
        return self.max_position_embeddings if learned or dynamic else None

    def without_prediction(self) -> "ModelConfig":
        """The model without layers for multi-token prediction, as far as the next token needs."""
        return replace(self, mtp_num_layers=None)

    @property
    def longrope_length(self) -> int | None:
        """Longest sequence that LongRoPE does not rotate as a long one; None without it."""
        scaling = self.rope_scaling or {}
        longrope = scaling.get("rope_type") == "longrope"
        return scaling["original_max_position_embeddings"] if longrope else None

    @property
    def max_written_length(self) -> int:
        """Longest sequence that can be written token by token."""
        positions = self.max_position_embeddings
        return min(positions, self.longrope_length or positions)

    def resized(
        self, sizes: Mapping[str, int], layers: Sequence[int] | None = None
    ) -> "ModelConfig":
        """Return the config of a smaller model, which every kind of pruning makes here.

        Args:
            sizes: name of a size -> its new value.
            layers: 0-based layers that stay. None where it is not known which do: then the first
                ones stand for them, for counting and for checks.
        """
        changed: dict[str, Any] = dict(sizes)
        if self.hybrid_layer_pattern is None and MLP not in "".join(kinds_of(self)):
            # Every layer has experts, so no layer has this width; it is kept equal to theirs.
            changed["ffn_hidden_size"] = changed.get(
                "moe_ffn_hidden_size", self.moe_ffn_hidden_size
            )
        first = range(changed.get("num_layers", self.num_layers))
        changed |= entries_of(self, first if layers is None else layers)
        if layers is not None:
            changed["num_layers"] = len(layers)
            if len(layers) < self.num_layers:
                original = self.kept_layers or list(range(self.num_layers))
                changed["kept_layers"] = [original[layer] for layer in layers]
        return replace(self, **changed)

    def save(self, folder: Path) -> None:
        """Write ``model.yaml`` into ``folder``.

        Optional fields are left out at their default (``config.layers.OPTIONAL``).
        """
        values = asdict(self)
        for optional in fields(self):
            if optional.metadata.get("optional") and values[optional.name] == optional.default:
                del values[optional.name]
        (folder / MODEL_YAML).write_text(yaml.safe_dump(values, sort_keys=False))

    @classmethod
    def load(cls, folder: Path) -> "ModelConfig":
        """Read ``model.yaml`` from ``folder``.

        Raises:
            ValueError: the file is missing or holds keys this version does not know.
        """
        path = folder / MODEL_YAML
        if not path.is_file():
            raise ValueError(f"{folder} is not a minitron checkpoint: {MODEL_YAML} is missing")
        values = read_yaml_mapping(path)
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"{path} holds unknown keys {sorted(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{path} is not a config of a model: {error}") from error

"""Bytes of activations that a layer keeps for its backward pass.

Counted tensor by tensor as the layers keep them: attention without its score matrix (flash), SwiGLU
as Megatron fuses it, norms and rotation fused where there are GPUs.
``tests/dist/test_planning_memory.py`` compares with what autograd really saves on a CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nemo_minitron.config.layers import ATTENTION, EXPERTS, LINEAR, MAMBA, MLP, kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.families.dims import DIMS
from nemo_minitron.families.registry import family_of


@dataclass(frozen=True)
class Tokens:
    """One micro-batch on one rank.

    Attributes:
        count: T.
        element: bytes of an activation.
        fused: norms and rotation are one kernel each (GPU).
        matmul: bytes of what a matrix product keeps of its input; 1 in fp8, which is a copy.
    """

    count: int
    element: int
    fused: bool
    matmul: int | None = None

    @classmethod
    def of(
        cls,
        data: DataConfig,
        parallel: ParallelConfig,
        *,
        bf16: bool,
        fused: bool,
        fp8: bool = False,
    ) -> "Tokens":
        """Describe a micro-batch of ``data`` at a layout."""
        local = data.seq_length * data.micro_batch_size // parallel.context_parallel_size
        return cls(local, 2 if bf16 else 4, fused, 1 if fp8 else None)


def residual(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return one hidden state, split over the tensor-parallel ranks under sequence parallelism."""
    split = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return tokens.count * config.hidden_size * tokens.element // split


def attention(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return bytes that attention keeps beside its input and output in the residual stream.

    The normed input; the rows of ``linear_qkv``, of which values are a view, and rotated queries
    and keys, or without Transformer Engine copies of the three; the output of the heads, which
    ``linear_proj`` reads, and the log-sum of each of its rows. Where some layers do not rotate
    (SmolLM3), this is the average over the layers.
    """
    if config.multi_latent:
        return _latent(config, parallel, tokens)
    heads, groups, width = config.num_attention_heads, config.num_query_groups, config.kv_channels
    rows: float = 2 * heads + 2 * groups
    every_rank = 0
    if config.position_embedding_type == "rope":
        rotating = 1 - sum(config.no_rope_freq or []) / config.num_layers
        if tokens.fused or config.qk_layernorm:  # otherwise LocalAttention copies what it keeps
            # Without rotation the keys are a view, but the queries of a group are still copied.
            rows += rotating * (heads + groups) + (1 - rotating) * heads
        # Sines and cosines, of queries and of keys.
        every_rank = 0 if tokens.fused else round(4 * width * config.rotary_percent * rotating)
    if config.qk_layernorm:
        rows += heads + groups + (0 if tokens.fused else heads)
    if config.attention_output_gate:
        # The gates, their sigmoids in fp32, and what they multiply.
        rows += (2 + 4 / tokens.element) * heads
    split = parallel.tensor_model_parallel_size
    # What the heads put out is kept by attention too, so linear_proj's copy in fp8 comes on top.
    copied = heads * width * (tokens.matmul or 0)
    kept = round(tokens.count * (rows * width * tokens.element + copied + heads * 4)) // split
    if _normalises_projections(config):
        # In fp32, whatever the activations are: the input of the norm, and input times weight.
        kept += tokens.count * 2 * (heads + groups) * width * 4 // split
    return _normed(config, parallel, tokens) + kept + tokens.count * every_rank * tokens.element


def _latent(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return bytes that multi-latent attention keeps beside its input and output.

    Both latents before and after their norms; queries before and after rotation; keys and values
    as the latent gives them and as attention reads them; the output of the heads.
    """
    heads, queries = config.num_attention_heads, config.query_channels
    given = (config.qk_head_dim or 0) + config.kv_channels
    rows = 3 * queries + given + 2 * config.kv_channels
    shared = 2 * (config.q_lora_rank or 0) + 2 * (config.kv_lora_rank or 0)
    split = parallel.tensor_model_parallel_size
    kept = tokens.count * heads * (rows * tokens.element + 4) // split
    return _normed(config, parallel, tokens) + kept + tokens.count * shared * tokens.element


def _normalises_projections(config: ModelConfig) -> bool:
    """Whether queries and keys are normalised over all heads together (OLMo-2)."""
    return any("q_layernorm" in row.name and "head" in row.dims for row in family_of(config).rows)


def _normed(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return the output of a norm; RMSNorm of several kernels keeps what it scales, too."""
    copies = 1 if tokens.fused or config.normalization == "LayerNorm" else 2
    kept = copies * residual(config, parallel, tokens)
    return kept if tokens.matmul is None else kept * tokens.matmul // tokens.element


def mlp(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return bytes that a dense MLP keeps, including its normed input."""
    channels = config.ffn_hidden_size * _kept_per_channel(config, tokens) * tokens.element
    kept = round(tokens.count * channels) // parallel.tensor_model_parallel_size
    return _normed(config, parallel, tokens) + kept


def experts(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return bytes that the chosen experts keep, including their normed input."""
    kept, split = _normed(config, parallel, tokens), parallel.tensor_model_parallel_size
    per_channel = _kept_per_channel(config, tokens)
    # Channels are weighted by the router, which only SwiGLU does in its kernel; tokens reach their
    # experts as copies (on a GPU twice, before and after they travel); the router works in fp32.
    weighted = 0 if tokens.fused or config.swiglu else 1
    channels = (config.moe_ffn_hidden_size or 0) * (per_channel + weighted)
    copies = (2 if tokens.fused else 1) * config.hidden_size
    routed = config.moe_router_topk * (channels // split + copies)
    shared = (config.moe_shared_expert_intermediate_size or 0) * per_channel // split
    router = 8 * (config.num_moe_experts or 0)
    return kept + round(tokens.count * ((routed + shared) * tokens.element + router))


def _kept_per_channel(config: ModelConfig, tokens: Tokens) -> float:
    """Elements per token and FFN channel: outputs of fc1, what the activation keeps, input of fc2.

    SwiGLU keeps the two halves that it is made of; other activations both of their factors, too.
    """
    elements = 2.0
    if config.gated_linear_unit:
        elements = 3 if config.swiglu else 5
    # The input of fc2 may be kept in fewer bytes.
    return elements if tokens.matmul is None else elements - 1 + tokens.matmul / tokens.element


def mamba(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return bytes that a Mamba layer keeps: its normed input, and both projections' activations.

    The kernels compute the convolution and the scan again in the backward pass from the projection.
    """
    projection, inner = (DIMS[dim].size(config) for dim in ("mamba_in", "mamba_inner"))
    kept = tokens.count * (projection + inner) * tokens.element
    return _normed(config, parallel, tokens) + kept // parallel.tensor_model_parallel_size


def linear(config: ModelConfig, parallel: ParallelConfig, tokens: Tokens) -> int:
    """Return bytes that a gated delta net keeps beside its input and output in the residual stream.

    The normed input; the projection; what is convolved after it; queries and keys of each value
    head; the output of the rule, its norm, and what the last matrix reads.
    """
    projection, convolved, inner = (
        DIMS[dim].size(config) for dim in ("linear_in", "linear_conv", "linear_inner")
    )
    repeated = 2 * (config.linear_num_value_heads or 0) * (config.linear_key_head_dim or 0)
    kept = tokens.count * (projection + 2 * convolved + repeated + 3 * inner) * tokens.element
    return _normed(config, parallel, tokens) + kept // parallel.tensor_model_parallel_size


_KEPT = {ATTENTION: attention, MLP: mlp, EXPERTS: experts, MAMBA: mamba, LINEAR: linear}


def layer(
    config: ModelConfig, parallel: ParallelConfig, tokens: Tokens, kinds: Sequence[str]
) -> int:
    """Return a whole layer: the input and the inside of all that it is made of.

    Args:
        config: global sizes.
        parallel: the layout.
        tokens: a micro-batch.
        kinds: letters of the layers in question; of several the largest counts.
    """
    return max(
        sum(
            residual(config, parallel, tokens) + _KEPT[kind](config, parallel, tokens)
            for kind in letters
        )
        for letters in {*kinds}
    )


def stage(
    config: ModelConfig,
    parallel: ParallelConfig,
    tokens: Tokens,
    trainer: TrainerConfig,
    kinds: Sequence[str],
    in_flight: float,
) -> float:
    """Activations of a pipeline stage while the most micro-batches are in flight.

    Args:
        config: the trained model.
        parallel: the layout.
        tokens: a micro-batch.
        trainer: says what is computed again in the backward pass.
        kinds: letters of the stage's layers.
        in_flight: micro-batches whose forward pass is done and whose backward is not.
    """
    all_kept = sum(layer(config, parallel, tokens, [kind]) for kind in kinds)
    whole, layers = layer(config, parallel, tokens, kinds), len(kinds)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    if trainer.recompute_granularity is None:
        return in_flight * all_kept
    modules = trainer.recompute_modules or []
    if trainer.recompute_granularity == "selective":
        # Attention without a score matrix keeps nothing that recomputing it would save.
        parts = {"mlp": MLP, "moe": EXPERTS}
        again = [
            _KEPT[kind](config, parallel, tokens) - residual(config, parallel, tokens)
            for module, kind in parts.items()
            for letters in kinds
            if module in modules and kind in letters
        ]
        return in_flight * (all_kept - sum(again)) + max(again, default=0)
    group = trainer.recompute_num_layers or 1
    kept = residual(config, parallel, tokens)
    if trainer.recompute_method == "block":
        cheap = min(group * chunks, layers)  # Megatron counts the layers of each model chunk
        return in_flight * (cheap * kept + (layers - cheap) * whole) + whole
    return in_flight * layers / group * kept + group * whole


def prediction(
    config: ModelConfig, parallel: ParallelConfig, tokens: Tokens, trainer: TrainerConfig
) -> int:
    """Return bytes that layers for multi-token prediction keep, on the last stage.

    Each is a layer as the model's last one. Beside it are the norms of the two states that it
    joins, the joined state of twice the width, and its final norm. With ``uniform`` recomputation
    only its two inputs are kept until it runs again.
    """
    state, count = residual(config, parallel, tokens), config.mtp_num_layers or 0
    if trainer.recompute_method == "uniform":
        return count * 2 * state
    return count * (layer(config, parallel, tokens, kinds_of(config)[-1:]) + 8 * state)


def micro_batches_in_flight(parallel: ParallelConfig, stage: int, micro_batches: int) -> float:
    """Return how many micro-batches a stage holds at most, in whole forward passes.

    1F1B: a stage runs as many forward passes ahead as there are stages after it. Interleaved, in
    passes of a model chunk: 2 (stages after it) + (chunks - 1) stages + 1
    (Megatron-Core, ``pipeline_parallel/schedules.py``).
    """
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is None:
        return min(pp - stage, micro_batches)
    ahead = 2 * (pp - stage - 1) + (chunks - 1) * pp + 1
    return min(ahead, micro_batches * chunks) / chunks

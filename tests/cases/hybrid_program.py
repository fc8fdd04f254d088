"""Megatron-Core's own HybridModel, written, read and run without any model code of this package.

What is ours is what a CPU needs: ``runtime.cpu`` in place of CUDA and of mamba_ssm's kernels. The
stack that Megatron-Core ships is of Transformer Engine alone, so this one has Megatron's local
modules under the names that the shipped one gives them on disk.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

from nemo_minitron.runtime import cpu

VOCAB, LENGTH = 64, 32
PATTERNS = {"nemotron_h": "M-M*|M-M*", "llama": "*-*-|*-*-"}
"""Letters of a hybrid model, and of one that could be a GPTModel."""
SIZES = {
    "num_layers": 8,
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_num_groups": 2,
    "mamba_state_dim": 16,
}
# What a run of Megatron-LM stores besides, as far as it describes the model.
ARGS = {
    "group_query_attention": True,
    "max_position_embeddings": LENGTH,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "quick_geglu": False,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "num_experts": None,
    "tokenizer_type": "NullTokenizer",
    "vocab_size": VOCAB - 1,
    "padded_vocab_size": VOCAB,
    "params_dtype": torch.float32,
}
OWN_ARGS = {
    "nemotron_h": {"swiglu": False, "squared_relu": True, "position_embedding_type": "none"},
    "llama": {"swiglu": True, "position_embedding_type": "rope", "rotary_base": 500},
}


def local_stack(experts: int | None = None, norm: Any = WrappedTorchNorm) -> ModuleSpec:
    """Layers of Megatron's local modules, whatever their letters."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer

    class LocalStack(HybridStack):
        def __init__(self, config: Any, submodules: Any, **more: Any) -> None:
            super().__init__(config, submodules, **{**more, "post_layer_norm": False})
            self.post_layer_norm = True
            if self.post_process:
                self.final_norm = norm(config, config.hidden_size)

    local = get_gpt_layer_local_spec(normalization="RMSNorm").submodules
    mamba = MambaLayerSubmodules(
        norm=norm,
        mixer=ModuleSpec(
            module=MambaMixer,
            submodules=MambaMixerSubmodules(
                in_proj=ColumnParallelLinear, out_proj=RowParallelLinear
            ),
        ),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
    )
    attention = TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=local.self_attention,
        self_attn_bda=local.self_attn_bda,
        sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=norm,
        mlp=local.mlp,
        mlp_bda=local.mlp_bda,
        sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
    )
    layers = HybridStackSubmodules(
        mamba_layer=ModuleSpec(module=MambaLayer, submodules=mamba),
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
    )
    if experts is not None:
        routed = get_gpt_layer_local_spec(experts, normalization="RMSNorm").submodules
        layers.moe_layer = ModuleSpec(
            module=MoETransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=norm,
                mlp=routed.mlp,
                mlp_bda=routed.mlp_bda,
            ),
        )
    return ModuleSpec(module=LocalStack, submodules=layers)


def _model(family: str, tp: int, pp: int) -> Any:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    cpu.install()
    cpu.install_mamba()
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(tp, pp)
    tensor_parallel.model_parallel_cuda_manual_seed(11)
    gated, pattern = OWN_ARGS[family]["swiglu"], PATTERNS[family]
    config = TransformerConfig(
        **SIZES,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32,
        is_hybrid_model=True,
        activation_func=torch.nn.functional.silu if gated else squared_relu,
        gated_linear_unit=gated,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
    )
    return HybridModel(
        config,
        local_stack(),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        hybrid_layer_pattern=pattern if pp == 2 else pattern.replace("|", ""),
        position_embedding_type=OWN_ARGS[family]["position_embedding_type"],
        rotary_base=OWN_ARGS[family].get("rotary_base"),
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    ).eval()


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor | None:
    """``[samples, s, v]`` on the last stage."""
    samples, length = ids.shape
    hidden = torch.empty(length, samples, SIZES["hidden_size"])
    group = parallel_state.get_pipeline_model_parallel_group()
    if not model.pre_process:
        dist.recv(hidden, dist.get_global_rank(group, 0), group=group)
        model.set_input_tensor(hidden)
    later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    found = model(ids, torch.arange(length).expand_as(ids), later)
    if not model.post_process:
        dist.send(found.contiguous(), dist.get_global_rank(group, 1), group=group)
        return None
    group = parallel_state.get_tensor_model_parallel_group()
    shards = [torch.empty_like(found) for _ in range(group.size())]
    dist.all_gather(shards, found.contiguous(), group=group)
    return torch.cat(shards, dim=-1)


def write(folder: str, family: str, tp: int, pp: int, ids: torch.Tensor) -> torch.Tensor | None:
    """A checkpoint of random weights, as a run of Megatron-LM leaves it, and its logits."""
    model, iteration = _model(family, tp, pp), Path(folder) / "iter_0000002"
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "layernorm.weight")):
                parameter.uniform_(0.5, 1.5, generator=draw)
    if dist.get_rank() == 0:
        iteration.mkdir(parents=True)
        (Path(folder) / "latest_checkpointed_iteration.txt").write_text("2")
    dist.barrier()
    own = {**OWN_ARGS[family], "hybrid_layer_pattern": PATTERNS[family]}
    args = Namespace(**SIZES, **ARGS, **own)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 2}
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.sharded_state_dict(metadata=metadata)
    dist_checkpointing.save({**state, "model": weights}, str(iteration))
    return _logits(model, ids)


def read(folder: str, family: str, tp: int, pp: int, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of a checkpoint; every tensor of the model has to be in it."""
    model = _model(family, tp, pp)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    weights = model.sharded_state_dict(metadata=metadata)
    model.load_state_dict(dist_checkpointing.load({"model": weights}, folder)["model"])
    return _logits(model, ids)

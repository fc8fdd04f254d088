"""Models of Megatron-Core that other programs built: what they are, and smaller ones of their kind.

Everything is read from the modules and from Megatron's configuration of them. What ``ModelConfig``
does not hold is refused by name, as it is in a checkpoint of Megatron-LM.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from nemo_minitron.checkpoint.foreign.megatron_fields import match_family, model_fields
from nemo_minitron.checkpoint.foreign.megatron_stated import Stated
from nemo_minitron.config.layers import kinds_of
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.windows import megatron_fields
from nemo_minitron.models.build import build_gpt, mark_tensor_parallel
from nemo_minitron.models.hidden import HiddenModel
from nemo_minitron.runtime.groups import ParallelGroups, initialised_degrees

Builder = Callable[[], list[Any]]
_OF_TRAINING = ("no_sync_func", "grad_sync_func", "param_sync_func", "grad_scale_func")
_SPLIT = ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage")
_UNEVEN = (
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
)


def config_of(chunk: Any) -> ModelConfig:
    """Return global sizes and switches of the model that a chunk is a part of.

    The vocabulary of a model that another program built is the padded one.

    Raises:
        ValueError: names the setting that no family of this package has.
    """
    built: tuple[ModelConfig, ParallelConfig] | None = getattr(chunk, "built_from", None)
    if built is not None:
        return built[0]
    if not isinstance(chunk, LanguageModule):
        raise ValueError(
            f"{type(chunk).__name__} is no GPTModel or HybridModel of Megatron-Core; give the "
            "model's chunks, one per virtual pipeline stage"
        )
    stated = Stated(type(chunk).__name__, _stated(chunk))
    _, config = match_family(stated, model_fields(stated, chunk.vocab_size))
    config.dtype = str(next(chunk.parameters()).dtype).removeprefix("torch.")
    return config


def _stated(chunk: Any) -> dict[str, Any]:
    """Return settings by the names of Megatron's TransformerConfig and GPTModel."""
    rotary = getattr(chunk, "rotary_pos_emb", None)
    own = ("position_embedding_type", "rotary_percent", "rotary_base", "hybrid_layer_pattern")
    values = {
        **vars(chunk.config),
        **{name: getattr(chunk, name, None) for name in own},
        "share_embeddings_and_output_weights": chunk.share_embeddings_and_output_weights,
        "seq_length": chunk.max_sequence_length,
        "rope_scaling": getattr(chunk, "rotary_scaling", False),
        "seq_len_interpolation_factor": getattr(rotary, "seq_len_interpolation_factor", None),
        "activation_func": _named(chunk.config.activation_func),
        "spec": None,
    }
    if rotary is not None and not hasattr(chunk, "rotary_base"):
        values |= _rotation(rotary.inv_freq, chunk.config.kv_channels)
    if values["rope_scaling"] and rotary is not None:
        # Only the frequencies say it: the slowest is divided by the whole factor.
        share = 2 / (2 * len(rotary.inv_freq))
        plain = float(chunk.rotary_base) ** (share - 1)
        values["rope_scaling_factor"] = round(plain / float(rotary.inv_freq[-1]), 3)
    return values


def _rotation(inv_freq: torch.Tensor, kv_channels: int) -> dict[str, float]:
    """Return base and share of a HybridModel's rotary positions, from the frequencies it keeps.

    Raises:
        ValueError: they are not those of a base, as of YaRN.
    """
    channels = 2 * len(inv_freq)
    slowest = float(inv_freq[-1]) ** (channels / (2 - channels)) if channels > 2 else 1e4
    base = float(f"{slowest:.6g}")  # fp32 tells no more digits
    powers = base ** (-torch.arange(0, channels, 2, device=inv_freq.device) / channels)
    if not torch.allclose(inv_freq, powers, rtol=1e-5, atol=0):
        raise ValueError(
            "rotary_pos_emb.inv_freq of the HybridModel is not made of one base; only "
            "position_embedding_type=rope is supported, without a scaling of its own"
        )
    return {"rotary_base": base, "rotary_percent": channels / kv_channels}


def _named(function: Any) -> Any:
    """Return an activation function as the YAML files of Megatron-Bridge write it."""
    if isinstance(function, functools.partial):
        return {"_target_": _named(function.func), **function.keywords}
    return getattr(function, "__name__", str(function))


def layout_of(chunk: Any) -> ParallelConfig:
    """Return the layout that a chunk was built for, which must be the initialised one.

    Raises:
        ValueError: Megatron's groups are not initialised, or experts or layers are split in a way
            that ``ParallelConfig`` does not hold.
    """
    degrees = initialised_degrees()
    groups = ParallelGroups.current()
    # Also without experts: the groups that rows travel in follow from both degrees.
    if groups.expt_tp.size() != groups.tp.size():
        raise ValueError(
            f"Megatron's process groups are initialised with expert_tensor_parallel_size="
            f"{groups.expt_tp.size()} and tensor_model_parallel_size={groups.tp.size()}; only "
            "equal ones are supported: leave expert_tensor_parallel_size out of "
            "initialize_model_parallel, or prune the checkpoint instead"
        )
    built: tuple[ModelConfig, ParallelConfig] | None = getattr(chunk, "built_from", None)
    if built is not None:
        different = {k: v for k, v in degrees.items() if getattr(built[1], k) != v}
        if different:
            raise ValueError(
                f"the model was built for {asdict(built[1])}, but Megatron's process groups are "
                f"initialised with {different}"
            )
        return built[1]
    config = chunk.config
    for name in _UNEVEN:
        if getattr(config, name, False):
            raise ValueError(
                f"{name}=true is not supported; use pipeline_model_parallel_layout, which says "
                "where every layer is"
            )
    layout = config.pipeline_model_parallel_layout
    return ParallelConfig(
        **degrees,  # type: ignore[arg-type]  # only the virtual stages may be None
        sequence_parallel=config.sequence_parallel,
        **{name: getattr(config, name) for name in _SPLIT},
        pipeline_model_parallel_layout=None if layout is None else str(layout),
    )


def _dtype_of(model: Any) -> torch.dtype:
    """Return the dtype of the largest parameter; a model may have been cast since it was built."""
    largest = max(model.parameters(), key=torch.Tensor.numel, default=None)
    built: torch.dtype = model.config.params_dtype
    return built if largest is None else largest.dtype


def builder_like(
    chunks: Sequence[Any], config: ModelConfig, pruned: ModelConfig, layout: ParallelConfig
) -> Builder:
    """Return a function that builds this rank's part of a smaller model like the given one.

    Args:
        chunks: this rank's part of the model, one per virtual stage.
        config: its sizes.
        pruned: sizes of the smaller one.
        layout: of the smaller one.

    Raises:
        ValueError: its class or its layer spec cannot be given other sizes; says why.
    """
    groups, like = ParallelGroups.current(), chunks[0]
    if isinstance(like, HiddenModel):
        return functools.partial(
            build_gpt,
            pruned,
            layout,
            groups,
            dtype=_dtype_of(like),
            max_sequence_length=like.max_sequence_length,  # type: ignore[attr-defined]  # as above
            settings=like.settings,
        )
    _check_layers(like, config, pruned)
    mcore = _resized(like.config, config, pruned, layout)
    arguments = []
    for stage, chunk in enumerate(chunks):
        known = _arguments(chunk, mcore, groups, None if len(chunks) == 1 else stage)
        if pruned.hybrid_layer_pattern is not None and pruned.num_layers != config.num_layers:
            from nemo_minitron.models.hybrid_spec import staged_pattern

            known["hybrid_layer_pattern"] = staged_pattern(pruned, layout)
        parameters = inspect.signature(type(like).__init__).parameters
        lacking = [
            name
            for name, one in list(parameters.items())[1:]
            if name not in known
            and one.default is one.empty
            and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        ]
        if lacking:
            raise ValueError(
                f"a smaller {type(like).__name__} cannot be built: it is not known what its "
                f"{', '.join(lacking)} should be; prune the checkpoint instead"
            )
        arguments.append({name: value for name, value in known.items() if name in parameters})
    return functools.partial(_build_like, like, mcore, arguments, (pruned, layout))


def _check_layers(like: Any, config: ModelConfig, pruned: ModelConfig) -> None:
    """Refuse layers of which nothing says how those of a smaller model are made.

    All ranks and stages come to the same answer.
    """
    if config.mtp_num_layers:
        raise ValueError(
            f"mtp_num_layers={config.mtp_num_layers}: it is not known how the layer for "
            f"multi-token prediction of a smaller {type(like).__name__} is built; prune the "
            "checkpoint instead"
        )
    if pruned.num_layers == config.num_layers or not hasattr(like, "transformer_layer_spec"):
        return
    listed = hasattr(_block_of(like.transformer_layer_spec), "layer_specs")
    if listed and len({*kinds_of(config)}) > 1:
        raise ValueError(
            f"the layer spec of {type(like).__name__} lists layers that differ, so it cannot say "
            "how those of a smaller model are made; prune the checkpoint instead"
        )


def _block_of(spec: Any) -> Any:
    """Return the part of a spec that may list one spec for each layer of a stage."""
    return spec if hasattr(spec, "layer_specs") else getattr(spec, "submodules", None)


def _build_like(
    like: Any, mcore: TransformerConfig, arguments: Sequence[dict[str, Any]], built_from: Any
) -> list[Any]:
    initialises, mcore.perform_initialization = mcore.perform_initialization, False
    chunks = [type(like)(**values) for values in arguments]
    mcore.perform_initialization = initialises
    for chunk in chunks:
        if hasattr(like, "rotary_pos_emb"):
            chunk.rotary_pos_emb = like.rotary_pos_emb  # nothing of it is pruned
        mark_tensor_parallel(chunk)
        chunk.to(next(like.parameters()).dtype)
        chunk.built_from = built_from
    return chunks


def _resized(
    old: TransformerConfig, config: ModelConfig, pruned: ModelConfig, layout: ParallelConfig
) -> TransformerConfig:
    """Return Megatron's configuration with other sizes, without what training left in the old."""
    mcore = copy.copy(old)
    changed = {
        name: value
        for name, value in vars(pruned).items()
        if value != getattr(config, name) and hasattr(old, name)
    }
    if "window_size" in changed:  # also to None, where the last layer with a window is cut
        changed |= {"window_attn_skip_freq": None, **megatron_fields(pruned)}
    if "moe_layer_freq" in changed:
        changed["moe_layer_freq"] = pruned.moe_layer_freq or 1  # Megatron's word for all alike
    if pruned.num_layers != config.num_layers:
        changed |= {name: getattr(layout, name) for name in _SPLIT}
        changed["pipeline_model_parallel_layout"] = None
        if pruned.hybrid_layer_pattern is not None:
            changed |= dict.fromkeys(_SPLIT)
    for name, value in (changed | dict.fromkeys(_OF_TRAINING)).items():
        setattr(mcore, name, value)
    return mcore


def _arguments(
    like: Any, mcore: TransformerConfig, groups: ParallelGroups, vp_stage: int | None
) -> dict[str, Any]:
    """Return the arguments of GPTModel or HybridModel that make a model like this."""
    chunks = mcore.virtual_pipeline_model_parallel_size or 1
    stage = vp_stage or 0
    same = (
        "vocab_size max_sequence_length fp16_lm_cross_entropy parallel_output hybrid_stack_spec "
        "share_embeddings_and_output_weights position_embedding_type rotary_percent rotary_base "
        "hybrid_layer_pattern"
    )
    known = {name: getattr(like, name) for name in same.split() if hasattr(like, name)}
    if hasattr(like, "transformer_layer_spec"):
        known["transformer_layer_spec"] = _spec(like, mcore, vp_stage, groups.pp.rank())
    return {
        **known,
        "config": mcore,
        "pre_process": groups.is_first_stage and stage == 0,
        "post_process": groups.is_last_stage and stage == chunks - 1,
        "pg_collection": like.pg_collection,
        "vp_stage": vp_stage,
    }


def _spec(like: Any, mcore: TransformerConfig, vp_stage: int | None, pp_rank: int) -> Any:
    """Return the layer spec, with as many layers as the stage now has where it lists them."""
    spec = like.transformer_layer_spec
    block = _block_of(spec)
    if not hasattr(block, "layer_specs") or mcore.num_layers == like.config.num_layers:
        return spec
    count = get_num_layers_to_build(mcore, vp_stage, pp_rank)
    if any(one != block.layer_specs[0] for one in block.layer_specs[1:]):
        raise ValueError(
            f"the layer spec of {type(like).__name__} lists layers that differ, so it cannot say "
            "how those of a smaller model are made; prune the checkpoint instead"
        )
    block = replace(block, layer_specs=block.layer_specs[:1] * count)
    if block is not spec and not hasattr(spec, "layer_specs"):
        spec = copy.copy(spec)
        spec.submodules = block
        return spec
    return block


def check_bare(chunks: Sequence[nn.Module]) -> None:
    """Refuse models that are wrapped for training: buffers and optimizer hold their old weights.

    Raises:
        ValueError: names the wrapper.
    """
    for chunk in chunks:
        if not hasattr(chunk, "decoder"):
            raise ValueError(
                f"{type(chunk).__name__} is no bare GPTModel or HybridModel; prune it before it is "
                "wrapped for training (DistributedDataParallel, Float16Module, optimizer)"
            )
        dtypes = sorted({str(p.dtype) for p in chunk.parameters() if torch.is_floating_point(p)})
        if len(dtypes) > 1:
            raise ValueError(f"the parameters are of several dtypes, {dtypes}; give them one")

"""Tasks for the rank pool: a GPTModel of megatron-core that another program built."""

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import nemo_minitron
from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.layout import padded_vocab_size
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from tests.cases.kd import batches, model_cfg, wrap, zero_gradients
from tests.cases.live import _load, _score, _start


def stock_model(config: ModelConfig, parallel: ParallelConfig, own: list[Any]) -> list[Any]:
    """As a program builds one that knows megatron-core alone, with the weights of ``own``."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    tp, vpp = (
        parallel.tensor_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
    )
    mcore = TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.kv_channels,
        normalization="RMSNorm",
        layernorm_epsilon=config.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_dtype=torch.float32,
        calculate_per_token_loss=True,
        # What a CPU cannot: Megatron's kernels, and batches of sends.
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        batch_p2p_comm=False,
    )
    first, last = parallel_state.is_pipeline_first_stage, parallel_state.is_pipeline_last_stage
    chunks = []
    for stage, mine in enumerate(own):
        model = GPTModel(
            config=mcore,
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=padded_vocab_size(config.vocab_size, tp),
            max_sequence_length=config.max_position_embeddings,
            pre_process=first(ignore_virtual=True) and stage == 0,
            post_process=last(ignore_virtual=True) and stage == len(own) - 1,
            position_embedding_type="rope",
            vp_stage=stage if vpp else None,
        )
        model.load_state_dict(mine.state_dict())
        chunks.append(model)
    return chunks


def _run(models: list[Any], micro_batches: list[Any], forward_step: Any, **over: Any) -> Any:
    """Megatron's schedule, as a training script calls it."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    iterators = [iter(list(micro_batches)) for _ in models]
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=models if len(models) > 1 else models[0],
        num_microbatches=len(micro_batches),
        seq_length=micro_batches[0]["tokens"].size(1),
        micro_batch_size=1,
        **over,
    )


def _forward_only(iterator: Any, model: Any) -> Any:
    batch = next(iterator)
    logits = model(batch["tokens"], batch["position_ids"], None)
    return logits, lambda output, non_loss_data=False: output.sum()


def _samples(ids: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    from nemo_minitron.data.samples import NpyDataset

    dataset = NpyDataset(ids.numpy(), len(ids))
    return [{k: v[None] for k, v in dataset[index].items()} for index in range(len(ids))]


def _gradients(models: list[Any]) -> dict[str, torch.Tensor]:
    return {
        f"{stage}.{name.removeprefix('module.')}": parameter.main_grad.clone()
        for stage, model in enumerate(models)
        for name, parameter in model.named_parameters()
    }


def _own_step(
    config: ModelConfig, folder: str, plan: Plan, parallel: ParallelConfig, small: list[Any]
) -> dict[str, torch.Tensor]:
    """Gradients of one global batch in our own distillation model."""
    from nemo_minitron.models.distill import DistillationGPTModel

    pruned = pruned_config(config, plan)
    layout = balanced_layout(config, pruned, parallel)
    model = DistillationGPTModel(model_cfg(pruned, config, layout))
    for chunk, mine in zip(model.chunks, small, strict=True):
        chunk.load_state_dict(mine.state_dict())
    model.load_teacher(Path(folder))
    wrap(model, use_distributed_optimizer=False)
    zero_gradients(model)
    model.forward_backward(batches(4, 16, config.vocab_size))
    return _gradients(list(model.model))


def _users_step(teacher: list[Any], small: list[Any], vocab_size: int) -> dict[str, torch.Tensor]:
    """The same in somebody else's training loop."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(chunk.config, settings, chunk) for chunk in small]
    small[0].config.finalize_model_grads_func = finalize_model_grads
    micro_batches = batches(4, 16, vocab_size)
    distillation = nemo_minitron.Distillation(teacher, wrapped, vocab_size=vocab_size)

    def forward_step(iterator: Any, model: Any) -> Any:
        batch, reads = next(iterator), []
        if model.module.pre_process:
            reads += ["tokens", "position_ids"]
        if model.module.post_process:
            reads += ["labels", "loss_mask"]
        batch = {key: value if key in reads else None for key, value in batch.items()}
        return distillation.forward_step(batch, model)

    for chunk in wrapped:
        chunk.train()
        chunk.zero_grad_buffer()
    _run(wrapped, micro_batches, forward_step, forward_only=False)
    return _gradients(wrapped)


def against_our_own(
    config: ModelConfig, folder: str, ids: torch.Tensor, parallel: ParallelConfig, targets: Any
) -> dict[str, Any]:
    """Scores, kept indices, weights and gradients of a stock model, and how ours differ."""
    from nemo_minitron.models.prune_live import prune_live

    groups = _start(parallel)
    own = _load(config, folder, parallel, groups)
    chunks = stock_model(config, parallel, own)
    teacher = stock_model(config, parallel, own)
    with nemo_minitron.score(chunks) as scores:
        _run(chunks, _samples(ids), _forward_only, forward_only=True, collect_non_loss_data=True)
    assert all(chunk.training for chunk in chunks)
    expected = _score(own, config, groups, ids, len(ids))
    plan = nemo_minitron.make_plan(scores, targets)
    own_plan = make_plan(config, PruningConfig(target=TargetConfig(targets)), expected)
    small = nemo_minitron.prune(chunks, plan)
    own_small, _ = prune_live(own, family_of(config), config, own_plan, parallel, groups)
    weights = [
        dict(torch.nn.ModuleList(models).named_parameters()) for models in (small, own_small)
    ]
    assert weights[0].keys() == weights[1].keys()
    theirs = _users_step(teacher, small, config.vocab_size)
    ours = _own_step(config, folder, own_plan, parallel, own_small)
    assert theirs.keys() == ours.keys()
    return {
        "scores": {
            name: ((scores[name] - values).abs() / values.abs().max()).max().item()
            for name, values in expected.items()
        },
        "meta": {k: (scores.meta[k], expected.meta[k]) for k in ("num_samples", "num_tokens")},
        "axes": (list(scores), list(expected)),
        "plans": (plan, own_plan),
        "class": {type(chunk).__name__ for chunk in small},
        "equal": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "gradients": max(
            ((theirs[name] - ours[name]).abs().max() / ours[name].abs().max()).item()
            for name in ours
        ),
    }


@contextmanager
def _adapter(chunks: list[Any], rank: int):
    """A part that no table knows, on one rank alone."""
    if torch.distributed.get_rank() == rank:
        chunks[-1].decoder.layers[0].adapter = torch.nn.Linear(4, 4)
    yield
    if torch.distributed.get_rank() == rank:
        del chunks[-1].decoder.layers[0].adapter


@contextmanager
def _setting(chunks: list[Any], name: str, value: object):
    before = getattr(chunks[0].config, name)
    setattr(chunks[0].config, name, value)
    yield
    setattr(chunks[0].config, name, before)


def refusals(
    config: ModelConfig, folder: str, parallel: ParallelConfig, ours: bool
) -> dict[str, tuple[str, bool]]:
    """What ``prune`` says to what it cannot do, and whether the weights are as they were."""
    from contextlib import nullcontext

    groups = _start(parallel)
    chunks = own = _load(config, folder, parallel, groups)
    if not ours:
        chunks = stock_model(config, parallel, own)
    before = [p.detach().clone() for chunk in chunks for p in chunk.parameters()]
    plan, last = full_plan(config), torch.distributed.get_world_size() - 1
    shallow = full_plan(config.resized({}, [0, 1]))
    wide = plan.replaced(hidden=[0, config.hidden_size])
    odd = plan.replaced(ffn=[list(range(51))] * config.num_layers)
    different = plan.replaced(hidden=[torch.distributed.get_rank()])
    cases: dict[str, Any] = {
        "part": (plan, _adapter(chunks, last)),
        "shallow": (shallow.replaced(layer=[0, 9]), nullcontext()),
        "wide": (wide, nullcontext()),
        "odd": (odd, nullcontext()),
        "different": (different, nullcontext()),
    }
    if not ours:
        cases["setting"] = (plan, _setting(chunks, "qk_l2_norm", True))
    found = {}
    for name, (chosen, context) in cases.items():
        said = ""
        with context:
            try:
                nemo_minitron.prune(chunks, chosen)
            except ValueError as error:
                said = str(error)
        after = [p for chunk in chunks for p in chunk.parameters()]
        found[name] = said, all(map(torch.equal, before, after))
    return found


def without_groups() -> str:
    """What scoring says where Megatron's groups are not initialised."""
    try:
        with nemo_minitron.score([torch.nn.Linear(2, 2)]):
            pass
    except ValueError as error:
        return str(error)
    return ""


def run_page(blocks: list[str], folder: str) -> list[str]:
    """Run the code of docs/api.md in a folder with ``runs/teacher``; the files that are there then.

    ``micro_batches`` is what the reader's program has.
    """
    import os

    _start(ParallelConfig())
    before, names = os.getcwd(), dict[str, Any](micro_batches=batches(2, 16, 101))
    os.chdir(folder)
    try:
        for block in blocks:
            exec(block, names)
    finally:
        os.chdir(before)
    loss, tokens = names["logged"][0]["distillation loss"].tolist()
    assert loss > 0
    assert tokens > 0
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*.safetensors"))

"""Tasks for the rank pool: models of megatron-core that another program built."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import nemo_minitron
from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.models.parts import stored
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from tests.cases.kd import batches, model_cfg, wrap, zero_gradients
from tests.cases.live import _load, _logits, _score, _start
from tests.cases.stock_models import by_name, fill, stock_model


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


def _gradients(models: list[Any], pairs: bool = False) -> dict[str, torch.Tensor]:
    def gradients(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
        yield from ((name, p.main_grad.clone()) for name, p in model.named_parameters())

    return by_name(models, gradients, pairs)


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


def _users_step(
    teacher: list[Any], small: list[Any], vocab_size: int, pairs: bool
) -> dict[str, torch.Tensor]:
    """Run the same step in a training loop that is not this package's."""
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
    return _gradients(wrapped, pairs)


def against_our_own(
    config: ModelConfig,
    folder: str,
    ids: torch.Tensor,
    parallel: ParallelConfig,
    targets: Any,
    pattern: str | None = None,
    teachers: ParallelConfig | None = None,
) -> dict[str, Any]:
    """Scores, kept indices, weights, logits and gradients of a stock model, and how ours differ.

    ``pattern`` builds a HybridModel; where ours is a GPT model it has two layers for each of ours.
    ``teachers`` is the layout of the teacher, where it splits sequences otherwise.
    """
    from nemo_minitron.models.prune_live import prune_live

    groups, pairs = _start(parallel), pattern is not None and config.hybrid_layer_pattern is None
    own = _load(config, folder, parallel, groups)
    chunks = stock_model(config, parallel, own, pattern)
    teacher = stock_model(config, teachers or parallel, own, pattern)
    with nemo_minitron.score(chunks) as scores:
        _run(chunks, _samples(ids), _forward_only, forward_only=True, collect_non_loss_data=True)
    assert all(chunk.training for chunk in chunks)
    expected = _score(own, config, groups, ids, len(ids))
    own_plan = make_plan(config, PruningConfig(target=TargetConfig(targets)), expected)
    if pairs:
        apart = _apart(config, parallel, own, str(pattern))
        expected["layer"] = _score(*apart, groups, ids, len(ids))["layer"]
        sizes = {name: size for name, size in targets.items() if name != "num_layers"}
        gone = {*range(config.num_layers)} - {*own_plan.layers}
        dropped = sorted(2 * layer + half for layer in gone for half in (1, 2))
        plan = nemo_minitron.make_plan(scores, sizes, drop_layers=dropped)
    else:
        plan = nemo_minitron.make_plan(scores, targets)
    small = nemo_minitron.prune(chunks, plan)
    own_small, _ = prune_live(own, family_of(config), config, own_plan, parallel, groups)
    weights = by_name(small, stored, pairs), by_name(own_small, stored)
    assert weights[0].keys() == weights[1].keys()
    logits, own_logits = (_logits(model, groups, ids) for model in (small, own_small))
    theirs = _users_step(teacher, small, config.vocab_size, pairs)
    ours = _own_step(config, folder, own_plan, parallel, own_small)
    assert theirs.keys() == ours.keys()
    return {
        "scores": {
            name: _difference(_of_its_layers(scores[name], values), values)
            for name, values in expected.items()
        },
        "meta": {k: (scores.meta[k], expected.meta[k]) for k in ("num_samples", "num_tokens")},
        "axes": (list(scores), list(expected)),
        "plans": (_in_pairs(plan) if pairs else plan, own_plan),
        "class": {type(chunk).__name__ for chunk in small},
        "equal": all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0]),
        "logits": _difference(logits, own_logits),
        "gradients": max(_difference(theirs[name], ours[name]) for name in ours),
    }


def edges(parallel: ParallelConfig) -> list[list[int]]:
    """Ranks of the groups in which a teacher's states come and go; no two are one group."""
    from nemo_minitron.models.in_schedule import _edges

    both = _edges(_start(parallel).pp, torch.device("cpu"))
    found = [group for group in both if group is not None]
    assert len({*map(id, found)}) == len(found)
    return [torch.distributed.get_process_group_ranks(group) for group in found]


def _difference(found: torch.Tensor | None, wanted: torch.Tensor | None) -> float:
    if found is None or wanted is None:  # logits, but on the last stage
        assert found is wanted
        return 0.0
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _of_its_layers(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Drop the rows of layers that do not have the axis, which are zeros."""
    if len(found) == len(wanted):
        return found
    halves = found[::2], found[1::2]
    empty = [not half.any() for half in halves]
    assert sorted(empty) == [False, True]
    return halves[empty.index(False)]


def _in_pairs(plan: Plan) -> Plan:
    """The plan of the GPT model of which every layer is two."""
    assert all(
        len(set(pair)) == 1
        for pair in zip(plan.layers[::2], (layer - 1 for layer in plan.layers[1::2]))
    )
    kept = {
        axis: lists if axis == "hidden" else [entry for entry in lists if entry != []]
        for axis, lists in plan.items()
    }
    return Plan({**kept, "layer": [layer // 2 for layer in plan.layers[::2]]})


def _apart(
    config: ModelConfig, parallel: ParallelConfig, own: list[Any], pattern: str
) -> tuple[list[Any], ModelConfig]:
    """Our own HybridModel with the weights of a GPT model, and its config."""
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.runtime.groups import ParallelGroups

    letters = pattern.replace("|", "")
    config = replace(config, num_layers=len(letters), hybrid_layer_pattern=letters)
    chunks = build_gpt(config, parallel, ParallelGroups.current())
    fill(chunks, own, pairs=True)
    return chunks, config


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
    """Return the errors of ``prune`` for bad input, and whether the weights are unchanged."""
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
        with context:
            said = _refusal(partial(nemo_minitron.prune, chunks, chosen))
        after = [p for chunk in chunks for p in chunk.parameters()]
        found[name] = said, all(map(torch.equal, before, after))
    return found


def hybrid_refusals(config: ModelConfig, folder: str, pattern: str, out: str) -> dict[str, str]:
    """Return the errors for a HybridModel that cannot be scored or pruned; its weights stay.

    Megatron-Core built it; only what it says of itself is changed.
    """
    parallel = ParallelConfig()
    groups = _start(parallel)
    (chunk,) = stock_model(config, parallel, _load(config, folder, parallel, groups), pattern)
    before, rotary = [p.detach().clone() for p in chunk.parameters()], chunk.rotary_pos_emb
    plan, odd = (
        nemo_minitron.make_plan(None, model=[chunk], drop_layers=drop) for drop in ([3, 4], [4])
    )
    letters = "hybrid_layer_pattern"
    cases: dict[str, tuple[Any, Any]] = {
        "frequencies": (plan, patch.object(rotary, "inv_freq", rotary.inv_freq.flip(0))),
        "prediction": (plan, patch.object(chunk, letters, pattern + "/*-")),
        "letter": (plan, patch.object(chunk, letters, pattern.replace("-", "G"))),
        "sinks": (plan, patch.object(chunk.config, "softmax_type", "learnable")),
        "part": (plan, _adapter([chunk], 0)),
    }
    found = {}
    for name, (chosen, context) in cases.items():
        with context:
            found[name] = _refusal(partial(nemo_minitron.prune, [chunk], chosen))
        assert all(map(torch.equal, before, chunk.parameters()))
    small = nemo_minitron.prune([chunk], odd)
    found["half"] = _refusal(partial(nemo_minitron.export, small, out))
    assert not list(Path(out).parent.iterdir())
    return found


def _refusal(call: Callable[[], object]) -> str:
    """Return the message of the error that a call raises."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def of_another_dtype(config: ModelConfig, folder: str, parallel: ParallelConfig) -> bool:
    """Whether a model of ours that was cast after it was built is pruned to the cast weights."""
    groups, plan = _start(parallel), full_plan(config)
    plan = plan.replaced(ffn=[list(range(2, 50))] * config.num_layers)
    expected = nemo_minitron.prune(_load(config, folder, parallel, groups), plan)
    chunks = [chunk.to(torch.bfloat16) for chunk in _load(config, folder, parallel, groups)]
    small = nemo_minitron.prune(chunks, plan)
    pairs = zip(expected[0].parameters(), small[0].parameters(), strict=True)
    return all(torch.equal(one.bfloat16(), other) for one, other in pairs)


def half_precision(config: ModelConfig, folder: str, wrapped: bool) -> tuple[torch.dtype, float]:
    """Dtype of the output of a student in bf16, and its loss beside itself as the teacher."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    from nemo_minitron.models.weights import load_frozen

    groups, parallel = _start(ParallelConfig()), ParallelConfig()
    config.save(Path(folder))
    teacher, student = (
        load_frozen(Path(folder), parallel, groups, dtype=torch.bfloat16) for _ in range(2)
    )
    inner = Float16Module(student[0].config, student[0]) if wrapped else student[0]
    settings = DistributedDataParallelConfig()
    model = DistributedDataParallel(student[0].config, settings, inner)
    distillation = nemo_minitron.Distillation(teacher, [model])
    output, loss = distillation.forward_step(batches(1, 16, config.vocab_size)[0], model)
    return output.dtype, loss(output)[0].item()


def experts_split_otherwise(config: ModelConfig, folder: str) -> tuple[str, bool]:
    """What ``prune`` says where Megatron splits experts over fewer ranks than all else."""
    from megatron.core import parallel_state

    from nemo_minitron.runtime.groups import ParallelGroups

    parallel, plan = ParallelConfig(tensor_model_parallel_size=2), full_plan(config)
    parallel_state.initialize_model_parallel(2, expert_tensor_parallel_size=1)
    (chunk,) = _load(config, folder, parallel, ParallelGroups.current())
    before = [p.detach().clone() for p in chunk.parameters()]
    plan = plan.replaced(ffn=[list(range(2, 50))] * config.num_layers)
    said = _refusal(partial(nemo_minitron.prune, [chunk], plan))
    return said, all(map(torch.equal, before, chunk.parameters()))


def without_groups() -> str:
    """Return the error of scoring without Megatron's process groups."""
    return _refusal(nemo_minitron.score([torch.nn.Linear(2, 2)]).__enter__)


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

"""One rank of a job that needs Transformer Engine: ``python -m tests.te.ranks FOLDER``.

``job.json`` in the folder is a list of cases (``Case``) that all ranks go through together. Each
rank writes ``rank<r>.json``, tensors go to ``<case>.<rank>.safetensors``, checkpoints to folders.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.te.kernels import torch_kernels
from tests.te.stand_in import cuda, import_transformer_engine


@dataclass(frozen=True)
class Case:
    """One model at one layout.

    Attributes:
        name: of the files that are written.
        checkpoint: a ``torch_dist`` checkpoint with its ``model.yaml``.
        parallel: keys of ``ParallelConfig``.
        run: whether to run, score and prune the model too.
        grouped: whether experts are multiplied together, where there are any.
        hooked: whether to look for the places of hooks.
    """

    name: str
    checkpoint: str
    parallel: dict[str, Any]
    run: bool = False
    grouped: bool = True
    hooked: bool = True


def main(folder: Path) -> None:
    """Go through the cases."""
    import_transformer_engine()
    from nemo_minitron.runtime import cpu
    from nemo_minitron.runtime.ranks import launched_world_size, rank

    torch.set_num_threads(1)
    cpu.install()
    cpu.install_delta_net()  # before there is said to be a GPU, which would need the kernels
    size = launched_world_size() or 1
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank(), world_size=size)
    answers = {}
    for keys in json.loads((folder / "job.json").read_text()):
        case = Case(**keys)
        with grouping(case.grouped):
            answers[case.name] = look_at(case, folder, rank())
    (folder / f"rank{rank()}.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def grouping(grouped: bool) -> Any:
    """Transformer Engine too old for grouped products, unless ``grouped``."""
    from nemo_minitron.models import build

    return mock.patch.object(build, "HAVE_GROUPED_GEMM", build.HAVE_GROUPED_GEMM and grouped)


def look_at(case: Case, folder: Path, rank: int) -> dict[str, Any]:
    """Everything asked of one case."""
    from nemo_minitron.config.model import ModelConfig
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.models.build import build_gpt
    from nemo_minitron.models.weights import load_weights, save_weights
    from nemo_minitron.runtime.groups import ParallelGroups
    from nemo_minitron.runtime.launch import init_model_parallel

    checkpoint = Path(case.checkpoint)
    config, parallel = ModelConfig.load(checkpoint), ParallelConfig(**case.parallel)
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    with cuda():
        chunks = build_gpt(config, parallel, groups)
    load_weights(chunks, groups, checkpoint)
    saved = folder / f"{case.name}-saved"
    if rank == 0:
        saved.mkdir()
    dist.barrier()
    save_weights(chunks, groups, config, saved)
    answer = {
        "first_expert": groups.ep.rank() * (config.num_moe_experts or 0) // groups.ep.size(),
        "parameters": {
            name: {
                "shape": list(parameter.shape),
                "split": bool(getattr(parameter, "tensor_model_parallel", False)),
            }
            for name, parameter in chunks[0].named_parameters()
        },
        "sharded": sharded(chunks, groups),
        "hooks": [hook for chunk in chunks for hook in hooks(chunk, groups)] if case.hooked else [],
        "settings": settings(chunks[0]),
    }
    if case.run:
        with torch_kernels(), buildable():
            run(case, folder, rank, config, parallel, groups)
    return answer


def sharded(chunks: list[Any], groups: Any) -> dict[str, Any]:
    """Key on disk -> global shape, as Megatron has it; and the objects that are left out."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories

    from nemo_minitron.models.weights import model_sharded_state_dict

    ours = model_sharded_state_dict(chunks, groups)
    apply_factories(ours)
    theirs = chunks[0].sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    objects = [value.key for value in nested_values(theirs) if isinstance(value, ShardedObject)]
    tensors = [value for value in nested_values(ours) if isinstance(value, ShardedTensor)]
    return {
        "tensors": {tensor.key: list(tensor.global_shape) for tensor in tensors},
        "others": len([v for v in nested_values(ours) if not isinstance(v, ShardedTensor)]),
        "objects": sorted({key.split("/")[0] for key in objects}),
    }


def hooks(chunk: Any, groups: Any) -> list[dict[str, str]]:
    """Every hook that scoring and the intermediate losses register, and the module it is on."""
    from nemo_minitron.config.distillation import INTERMEDIATE_LOSSES
    from nemo_minitron.config.stages import ScoreConfig
    from nemo_minitron.importance.hooks import record
    from nemo_minitron.models.places import places_of, watch

    before = {id(module): _hook_ids(module) for module in chunk.modules()}
    found: list[dict[str, str]] = []

    def note(owner: str) -> None:
        for name, module in chunk.named_modules():
            for kind, keys in _hook_ids(module).items():
                for _ in keys - before[id(module)][kind]:
                    where = {"owner": owner, "module": name, "kind": kind}
                    found.append({**where, "class": type(module).__name__})

    moments = ["hidden", "head"] if chunk.config.num_moe_experts else ["hidden", "ffn", "head"]
    with record([chunk], groups, ScoreConfig(moments=moments), lambda index: 1):
        note("scores")
    for kind in INTERMEDIATE_LOSSES:
        for place in places_of(chunk):
            if place == chunk.config.num_layers and kind in ("attention_relation", "mlp_input"):
                continue
            handle = watch(chunk, kind, place, lambda states, joined: joined)
            note(f"{kind} {place}")
            handle.remove()
    return found


def _hook_ids(module: torch.nn.Module) -> dict[str, set[int]]:
    return {
        "input": set(module._forward_pre_hooks),
        "output": set(module._forward_hooks),
    }


def settings(chunk: Any) -> dict[str, Any]:
    """What the model is built with where there is a GPU."""
    names = ("moe_grouped_gemm", "apply_rope_fusion", "bias_activation_fusion", "normalization")
    return {name: getattr(chunk.config, name) for name in names}


@contextmanager
def buildable() -> Iterator[None]:
    """Models built here do without the fusions and the dispatcher that need CUDA."""
    from nemo_minitron.models import build

    settings_of, build_chunk = build.transformer_config, build._build_chunk

    def plain(*args: Any, **kwargs: Any) -> Any:
        with cuda():
            config = settings_of(*args, **kwargs)
        config.apply_rope_fusion = False
        config.bias_activation_fusion = config.bias_dropout_fusion = False
        config.moe_token_dispatcher_type = "allgather"
        return config

    def built(*args: Any, **kwargs: Any) -> Any:
        with cuda():
            return build_chunk(*args, **kwargs)

    with (
        mock.patch.object(build, "transformer_config", plain),
        mock.patch.object(build, "_build_chunk", built),
    ):
        yield


def run(case: Case, folder: Path, rank: int, config: Any, parallel: Any, groups: Any) -> None:
    """Logits and scores of the model; and the model pruned in memory, saved."""
    from safetensors.torch import load_file, save_file

    from nemo_minitron.families.registry import family_of
    from nemo_minitron.models.prune_live import prune_live
    from nemo_minitron.models.weights import save_weights
    from nemo_minitron.pruning.plan import Plan
    from tests.cases.live import _load, _logits, _score

    home = Path(case.checkpoint)
    ids = load_file(home.parent / "ids.safetensors")["ids"]
    chunks = _load(config, str(home), parallel, groups)
    logits = _logits(chunks, groups, ids)
    assert logits is not None, "there is one pipeline stage"
    scores = _score(chunks, config, groups, ids, len(ids))
    tensors = {f"scores.{axis}": torch.as_tensor(values) for axis, values in scores.items()}
    save_file({"logits": logits, **tensors}, folder / f"{case.name}.{rank}.safetensors")
    plan = Plan.load(home.parent)
    small, pruned = prune_live(chunks, family_of(config), config, plan, parallel, groups)
    target = folder / f"{case.name}-pruned"
    if rank == 0:
        target.mkdir()
        pruned.save(target)
    dist.barrier()
    save_weights(small, groups, pruned, target)


def jobs(cases: list[Case]) -> list[dict[str, Any]]:
    """The cases as ``job.json`` has them."""
    return [asdict(case) for case in cases]


if __name__ == "__main__":
    main(Path(sys.argv[1]))

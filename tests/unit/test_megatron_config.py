"""The section ``megatron:`` names, types and owners, against the installed Megatron-Core."""

import contextlib
import dataclasses
import inspect
import re
import sys
from dataclasses import replace
from typing import Any

import pytest

from nemo_minitron.checkpoint.manifest import config_hash
from nemo_minitron.config import load, megatron_owned, schema
from nemo_minitron.config.identity import config_values
from nemo_minitron.config.megatron import (
    PARTS,
    ForwardMegatronConfig,
    MegatronConfig,
    check_optimizer,
    merged_recompute,
)
from nemo_minitron.config.stages import STAGE_CONFIGS, DistillConfig, FinetuneConfig, SearchConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.runtime.megatron_fields import annotations, dataclass_of, resolved
from tests.unit.test_config import complete

TRAIN = ("distill", "finetune", "search")
RUN = ("importance", "prune", "evaluate", "generate", "teacher_logits", "benchmark")


def compose(stage, *overrides):
    return load.compose(stage, complete(stage, list(overrides)))


def test_any_field_without_a_plus():
    keys = ["recompute_granularity=full", "attention_backend=flash", "fp8=hybrid"]
    cfg = compose(
        "distill",
        *(f"megatron.transformer.{key}" for key in keys),
        "megatron.ddp.overlap_grad_reduce=true",
        "megatron.ddp.bucket_size=1000",
        "megatron.optimizer.decoupled_lr=1e-5",
    )
    assert isinstance(cfg, DistillConfig)
    assert cfg.megatron == MegatronConfig(
        transformer={
            "recompute_granularity": "full",
            "attention_backend": "flash",
            "fp8": "hybrid",
        },
        ddp={"overlap_grad_reduce": True, "bucket_size": 1000},
        optimizer={"decoupled_lr": 1e-5},
    )


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("transformer.num_layers=3", r"num_layers.*use pruning\.target\.num_layers of minitron"),
        ("transformer.hidden_size=64", r"use pruning\.target\.hidden_size"),
        ("transformer.tensor_model_parallel_size=2", r"use parallel\.tensor_model_parallel_size"),
        ("transformer.sequence_parallel=true", r"use parallel\.sequence_parallel"),
        ("transformer.bf16=true", r"use trainer\.precision"),
        ("transformer.qk_layernorm=true", r"the family of the model"),
        ("transformer.hidden_dropout=0.1", r"without dropout"),
        ("transformer.calculate_per_token_loss=false", r"sums over the tokens"),
        ("transformer.timers=x", r"an object of Python"),
        ("transformer.cuda_graph_impl=local", r"CUDA graphs"),
        ("ddp.use_distributed_optimizer=true", r"use optim\.use_distributed_optimizer"),
        ("ddp.average_in_collective=true", r"summed, not averaged"),
        ("ddp.fp8_param_gather=true", r"use megatron\.transformer\.fp8_param"),
        ("optimizer.lr=1", r"use optim\.lr"),
        ("optimizer.clip_grad=1", r"use trainer\.gradient_clip_val"),
        ("optimizer.overlap_param_gather=true", r"use megatron\.ddp\.overlap_param_gather"),
        # Names
        (
            "transformer.recompute_granularty=full",
            r"did you mean megatron\.transformer\.recompute_granularity\?",
        ),
        ("ddp.overlap_grad_reduc=true", r"did you mean megatron\.ddp\.overlap_grad_reduce\?"),
        ("transformer.overlap_grad_reduce=true", r"it is megatron\.ddp\.overlap_grad_reduce"),
        (
            "transformer.wholly_unlike=1",
            r"TransformerConfig of .*megatron-core .* has no wholly",
        ),
        # Types
        ("transformer.fp8=e3m4", r"fp8=e3m4 must be e4m3 or hybrid or null"),
        ("transformer.attention_backend=best", r"must be flash or fused"),
        ("transformer.fp8_margin=1.5", r"fp8_margin=1.5 must be an integer"),
        ("transformer.fp8_margin=true", r"must be an integer"),
        ("transformer.bias_dropout_fusion=1", r"must be true or false"),
        ("transformer.recompute_modules=mlp", r"must be a list of text or null"),
        ("optimizer.decoupled_lr=nan", r"decoupled_lr=nan must be a finite number or null"),
        ("ddp.bucket_size=big", r"must be an integer or null"),
        ("optimizer.exp_avg_dtype=half", r"must be float32 or fp32 or bfloat16"),
        # Relations
        ("transformer.recompute_granularity=none", r"must be full or selective or null"),
        ("transformer.recompute_num_layers=2", r"needs megatron\.transformer\.recompute_gran"),
        ("ddp.align_param_gather=true", r"needs megatron\.ddp\.overlap_param_gather=true"),
    ],
)
def test_what_is_refused(key, says):
    with pytest.raises(ValueError, match=says):
        compose("distill", f"megatron.{key}")


def test_values_become_what_megatron_takes():
    import torch

    found = resolved(
        "optimizer", {"exp_avg_dtype": "bf16", "exp_avg_sq_dtype": "fp8", "decoupled_lr": 1}
    )
    assert found == {
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.uint8,
        "decoupled_lr": 1.0,
    }
    backend = resolved("transformer", {"attention_backend": "fused"})["attention_backend"]
    assert backend.name == "fused"
    assert resolved("transformer", {"cp_comm_type": ["p2p", "a2a"]})["cp_comm_type"] == [
        "p2p",
        "a2a",
    ]
    assert resolved("ddp", {"bucket_size": None}) == {"bucket_size": None}


@pytest.mark.parametrize("part", PARTS)
def test_every_field_can_be_read(part):
    """Each is set elsewhere, or a value of its default's kind is taken."""
    cls = dataclass_of(part)
    for field in dataclasses.fields(cls):
        default = field.default
        if field.name in PARTS[part] or default is dataclasses.MISSING:
            continue
        plain = {"torch.float32": "float32"}.get(str(default), getattr(default, "name", default))
        plain = list(plain) if isinstance(plain, tuple) else plain
        assert resolved(part, {field.name: plain})[field.name] == default, field.name
    unknown = re.compile("object that Python code alone")
    from nemo_minitron.runtime.megatron_fields import expected

    objects = [
        name
        for name, annotation in annotations(part).items()
        if unknown.search(expected(annotation)) and name not in PARTS[part]
    ]
    assert not objects, "whoever gives one of them should hear why not"


def test_what_this_package_sets_is_owned(monkeypatch):
    """No field is set in silence: the section either wins over it or says who sets it."""
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.models import build, settings
    from tests.helpers.tiny import LLAMA, MIXTRAL

    seen: dict[str, dict[str, Any]] = {}

    def spy(part, module, name):
        cls = dataclass_of(part)

        def made(**kwargs):
            seen[part] = {**seen.get(part, {}), **kwargs}
            return cls(**kwargs)

        monkeypatch.setattr(module, name, made)

    spy("transformer", build, "TransformerConfig")
    spy("ddp", settings, "DistributedDataParallelConfig")
    spy("optimizer", settings, "OptimizerConfig")
    import torch

    optim, trainer, section = OptimConfig(), TrainerConfig(), MegatronConfig()
    for model in (LLAMA, MIXTRAL):
        keys = settings.trained_settings(trainer, section)
        made = build.transformer_config(model, ParallelConfig(), torch.float32, keys)
    ddp = settings.ddp_config(optim, section, 2)
    settings.optimizer_config(optim, trainer, section, (ddp, made))
    free = {
        "transformer": {
            *settings.transformer_defaults(LLAMA, on_gpu=True, have_te=True),
            *settings.trained_settings(trainer, section),
        },
        "ddp": {
            "check_for_nan_in_grad",
            *settings.ddp_defaults(on_gpu=True, replicas=2, distributed_optimizer=True),
        },
        "optimizer": set(),
    }
    for part, given in seen.items():
        assert set(given) <= {*PARTS[part], *free[part]}, part
        assert not set(free[part]) & set(PARTS[part]), "what is owned cannot be given"


def test_tables_name_fields_of_megatron():
    """Of the installed release or, in the list, of another one that is supported."""
    elsewhere = {
        "moe_extended_tp",
        "preserve_fp32_weights",
        "muon_use_nesterov",
        "async_tensor_model_parallel_allreduce",
    }
    import importlib.metadata

    newest = importlib.metadata.version("megatron-core").startswith("0.19")
    for part, owned in PARTS.items():
        missing = set(owned) - set(annotations(part)) - elsewhere
        assert not newest or not missing, (part, missing)
    fields = set(annotations("transformer"))
    if newest:
        assert fields >= megatron_owned.NEEDS_TE | megatron_owned.TRAINING_ONLY
    assert not (megatron_owned.NEEDS_TE | megatron_owned.TRAINING_ONLY) & set(
        megatron_owned.TRANSFORMER
    )


def test_stages_have_the_parts_they_use():
    for stage, cls in STAGE_CONFIGS.items():
        found = [key.name for key in schema.keys(cls) if key.name.startswith("megatron.")]
        wanted = ["transformer", "ddp", "optimizer"] if stage in TRAIN else ["transformer"]
        assert found == ([f"megatron.{part}" for part in wanted] if stage in TRAIN + RUN else [])


@pytest.mark.parametrize("stage", RUN)
def test_a_part_that_is_not_used_is_refused(stage):
    with pytest.raises(ValueError, match=f"megatron.ddp.bucket_size is not a key of {stage}"):
        compose(stage, "megatron.ddp.bucket_size=1")
    with pytest.raises(ValueError, match=r"recompute_granularity=full is for the backward pass"):
        compose(stage, "megatron.transformer.recompute_granularity=full")
    cfg = compose(stage, "megatron.transformer.deterministic_mode=true")
    assert cfg.megatron == ForwardMegatronConfig(transformer={"deterministic_mode": True})


def test_search_trains_or_not():
    line = ["search.num_layers=[2]", "megatron.ddp.bucket_size=1"]
    with pytest.raises(ValueError, match=r"megatron.ddp=.*no effect with search.distill.steps=0"):
        compose("search", *line)
    cfg = compose("search", *line, "search.distill.steps=3")
    assert isinstance(cfg, SearchConfig)
    assert cfg.megatron.ddp == {"bucket_size": 1}


def test_gathering_needs_the_distributed_optimizer():
    section = MegatronConfig(ddp={"overlap_param_gather": True})
    check_optimizer(section, OptimConfig())
    with pytest.raises(ValueError, match=r"needs optim.use_distributed_optimizer=true"):
        check_optimizer(section, OptimConfig(use_distributed_optimizer=False))
    with pytest.raises(ValueError, match=r"needs megatron.ddp.overlap_grad_reduce=true"):
        MegatronConfig(ddp={"overlap_param_gather": True, "overlap_grad_reduce": False})


def test_recomputation_from_either_place():
    trainer, full = TrainerConfig(), {"recompute_granularity": "full"}
    alone = merged_recompute(trainer, MegatronConfig(transformer=full))
    assert (alone.recompute_method, alone.recompute_num_layers) == ("uniform", 1)
    block = MegatronConfig(transformer={**full, "recompute_method": "block"})
    assert merged_recompute(trainer, block).recompute_method == "block"
    old = TrainerConfig(recompute_granularity="selective")
    assert merged_recompute(old, MegatronConfig()) is old
    with pytest.raises(ValueError, match=r"trainer.recompute_granularity=selective and megatron"):
        merged_recompute(old, MegatronConfig(transformer=full))
    same = {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
    assert merged_recompute(old, MegatronConfig(transformer=same)).recompute_modules == ["mlp"]


def test_an_empty_section_leaves_no_trace():
    """Results of versions without it stay what they are."""
    cfg = FinetuneConfig(output_dir="o", checkpoint="c", data=DataConfig(path="x"))
    assert not [key for key in config_values(cfg) if key.startswith("megatron")]
    before = config_hash(cfg)
    cfg.megatron = MegatronConfig(ddp={"bucket_size": 5})
    assert config_values(cfg)["megatron.ddp.bucket_size"] == 5
    assert config_hash(cfg) != before


def test_defaults_on_a_gpu():
    """Communication beside computation where there is any; the user's word counts."""
    from nemo_minitron.models.settings import ddp_config, ddp_defaults, transformer_defaults
    from tests.helpers.tiny import LLAMA

    keys: dict[str, Any] = {"on_gpu": True, "replicas": 8, "distributed_optimizer": True}
    assert ddp_defaults(**keys) == {
        "grad_reduce_in_fp32": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
    }
    for change in ({"on_gpu": False}, {"replicas": 1}):
        found = ddp_defaults(**{**keys, **change})
        assert not found["overlap_grad_reduce"]
        assert not found["overlap_param_gather"]
    assert not ddp_defaults(**{**keys, "distributed_optimizer": False})["overlap_param_gather"]
    fused = transformer_defaults(LLAMA, on_gpu=True, have_te=True)
    on_cpu = transformer_defaults(LLAMA, on_gpu=False, have_te=False)
    assert fused["bias_activation_fusion"]
    assert on_cpu["bias_activation_fusion"], "the same function of Megatron, uncompiled"
    assert fused["apply_rope_fusion"]
    assert fused["persist_layer_norm"]
    beside = transformer_defaults(LLAMA, on_gpu=True, have_te=True, overlap_p2p=True)
    assert (fused["batch_p2p_comm"], beside["batch_p2p_comm"]) == (True, False), "one of both"
    made = ddp_config(OptimConfig(), MegatronConfig(ddp={"overlap_param_gather": True}), 2)
    assert made.overlap_grad_reduce, "gathering beside the forward pass needs it"


@pytest.mark.parametrize(
    ("stages", "count", "group", "fits"),
    [
        (2, 8, 2, True),
        (2, 8, 3, True),  # 3 + 3 + 2
        (2, 8, 8, True),
        (2, 8, 9, False),
        (2, 8, 1, False),
        (4, 12, 5, False),  # 5 + 5 + 2
        (4, 12, 4, True),
        (4, 12, None, True),
    ],
)
def test_micro_batches_that_a_virtual_stage_runs_in_a_row(stages, count, group, fits):
    """Megatron itself says it in the first step, when everything has been loaded."""
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.data.checks import check_batches

    parallel = ParallelConfig(
        pipeline_model_parallel_size=stages, virtual_pipeline_model_parallel_size=2
    )
    data = DataConfig(path="x", seq_length=8, global_batch_size=count, micro_batch_size=1)
    says = f"microbatch_group_size_per_vp_stage={group} must be between"
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match=says):
        check_batches(data, parallel, stages, group)


def test_what_this_machine_cannot_do():
    """There is no Transformer Engine without a GPU; Megatron's own rules are heard too."""
    from nemo_minitron.config.parallel import ParallelConfig
    from nemo_minitron.models.settings_check import check_training_with_megatron
    from nemo_minitron.models.spec import HAVE_TE
    from tests.helpers.tiny import GPT2, LLAMA, MIXTRAL

    def check(model=LLAMA, parallel=None, **parts):
        args = (parallel or ParallelConfig(), TrainerConfig(), OptimConfig())
        check_training_with_megatron(MegatronConfig(**parts), model, *args)

    if not HAVE_TE:
        with pytest.raises(ValueError, match=r"fp8=hybrid needs Transformer Engine"):
            check(transformer={"fp8": "hybrid"})
        with pytest.raises(ValueError, match=r"needs Transformer Engine's Adam"):
            check(optimizer={"use_precision_aware_optimizer": True})
        with pytest.raises(ValueError, match=r"dispatcher_type=alltoall needs a GPU"):
            check(MIXTRAL, transformer={"moe_token_dispatcher_type": "alltoall"})
    with pytest.raises(ValueError, match=r"bias_activation_fusion=true .*the exact GELU"):
        check(replace(GPT2, activation="gelu"), transformer={"bias_activation_fusion": True})
    with pytest.raises(ValueError, match=r"overlap_p2p_comm=True is for the interleaved schedule"):
        check(transformer={"overlap_p2p_comm": True})
    with pytest.raises(ValueError, match=r"exclude each other; leave batch_p2p_comm out"):
        check(
            parallel=ParallelConfig(
                pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
            ),
            transformer={"overlap_p2p_comm": True, "batch_p2p_comm": True},
        )
    with pytest.raises(ValueError, match=r"Megatron refuses megatron.optimizer.exp_avg_dtype=bf16"):
        check(optimizer={"exp_avg_dtype": "bf16"})
    check(transformer={"recompute_granularity": "full"}, ddp={"overlap_grad_reduce": True})


def test_megatron_is_imported_for_a_section_alone():
    """``--help`` and stages without the section stay light."""
    source = inspect.getsource(sys.modules[MegatronConfig.__module__])
    assert not re.search(r"^(import|from) (torch|megatron)", source, re.MULTILINE)

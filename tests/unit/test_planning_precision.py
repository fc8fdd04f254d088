"""``plan`` counts the settings of Megatron's own that change memory."""

from dataclasses import replace
from typing import Any

import pytest

from nemo_minitron.config import load
from nemo_minitron.config.megatron import MegatronConfig
from nemo_minitron.config.stages import (
    DistillConfig,
    FinetuneConfig,
    ImportanceConfig,
    PlanConfig,
    PruneConfig,
)
from nemo_minitron.config.training import DataConfig, OptionalDataConfig, TrainerConfig
from nemo_minitron.planning.advice import _changes
from nemo_minitron.planning.compute import work
from nemo_minitron.planning.memory import Job, fullest_rank
from nemo_minitron.planning.precision import TrainedBytes, weight_bytes
from nemo_minitron.planning.shares import shares
from tests.unit.test_config import complete
from tests.unit.test_planning import model

LLAMA_8B = model("llama31_8b")


def job(megatron: MegatronConfig | None = None, **trainer):
    cfg = FinetuneConfig(
        output_dir="o",
        checkpoint="c",
        data=DataConfig(path="x", seq_length=4096, global_batch_size=8),
        trainer=TrainerConfig(precision="bf16-mixed", **trainer),
        megatron=megatron or MegatronConfig(),
    )
    return Job(cfg, LLAMA_8B, None, 8, on_gpus=True)


def memory(*args, **kwargs):
    return fullest_rank(job(*args, **kwargs))


def flops(job: Job) -> float:
    found = work(job).flops
    assert found is not None
    return found


def test_bytes_of_a_parameter():
    """Megatron's own figures: 2 + 4 + 12 bytes; 8 with everything in bf16 but the weights."""
    assert TrainedBytes.of(MegatronConfig(), bf16=True) == TrainedBytes(4, 12)
    assert TrainedBytes.of(MegatronConfig(), bf16=False) == TrainedBytes(4, 8)
    small = MegatronConfig(ddp={"grad_reduce_in_fp32": False})
    assert TrainedBytes.of(small, bf16=True) == TrainedBytes(2, 16), "Adam's copy in fp32"
    assert TrainedBytes.of(small, bf16=False) == TrainedBytes(4, 8), "there is nothing to save"
    preset = load.compose("distill", complete("distill", ["megatron=low_memory_optimizer"]))
    assert isinstance(preset, DistillConfig)
    assert TrainedBytes.of(preset.megatron, bf16=True) == TrainedBytes(2, 6)
    whole = replace(
        preset.megatron,
        optimizer={**preset.megatron.optimizer, "store_param_remainders": False},
    )
    assert TrainedBytes.of(whole, bf16=True) == TrainedBytes(2, 8)


def test_recomputation_of_either_section():
    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    one = memory(**full, recompute_num_layers=1)
    other = memory(MegatronConfig(transformer={"recompute_granularity": "full"}))
    assert one == other
    assert one.activations < memory().activations / 4
    recomputed = job(MegatronConfig(transformer={"recompute_granularity": "full"}))
    assert flops(recomputed) > flops(job())


def test_advice_names_the_keys_in_use():
    section = MegatronConfig(transformer={"recompute_granularity": "selective"})
    words = [word for word, _ in _changes(job(section).cfg)]
    assert any(word.startswith("megatron.transformer.recompute_granularity=full") for word in words)
    changed = next(c for w, c in _changes(job(section).cfg) if "recompute" in w)(job(section).cfg)
    assert changed.megatron.transformer["recompute_method"] == "uniform"
    words = [word for word, _ in _changes(job().cfg)]
    assert any(word.startswith("trainer.recompute_granularity=full") for word in words)


def test_weights_in_fp8():
    """Matrices of layers alone; copies for both directions where there is a backward pass."""
    (share,) = shares(LLAMA_8B, job().parallel)
    outer = 2 * LLAMA_8B.vocab_size * LLAMA_8B.hidden_size
    layers = share.total - outer
    kept = MegatronConfig(transformer={"fp8": "hybrid"})
    stored = MegatronConfig(transformer={"fp8": "hybrid", "fp8_param": True})

    def size(section, trained):
        return weight_bytes(LLAMA_8B, share, section, 2, trained=trained)

    assert size(MegatronConfig(), True) == 2 * share.total
    assert size(kept, True) == 2 * share.total + 2 * layers
    assert size(kept, False) == 2 * share.total
    assert size(stored, True) == 2 * outer + 2 * layers
    assert size(stored, False) == 2 * outer + layers
    assert memory(kept).activations < memory().activations


def test_whole_plans(tmp_path):
    """Through the command line's road; Transformer Engine need not be there to plan."""
    from nemo_minitron.pipeline.plan import of_one_stage, read_items
    from nemo_minitron.planning.items import plan_items

    found = {}
    for name in ("overlap", "low_memory_optimizer", "recompute_full", "fp8_hybrid"):
        line = [
            "checkpoint=none",
            "data.path=x",
            "model=llama31_8b",
            "trainer.precision=bf16-mixed",
        ]
        keys = ["nodes=1", "parallel=tp8_sp", f"megatron={name}", *line]
        with load.hydra_for(None):
            cfg = load.compose("plan", of_one_stage("finetune", keys))
            assert isinstance(cfg, PlanConfig)
            (item,) = plan_items(cfg, read_items(cfg, at_hand=False))
        assert item.run is not None
        found[name] = item.run.memory
    plain = found["overlap"]
    assert found["low_memory_optimizer"].total < plain.total
    assert found["recompute_full"].activations < plain.activations
    assert found["fp8_hybrid"].weights > plain.weights


@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 2), ("float32", 4)])
def test_scoring_is_in_the_dtype_of_the_model(dtype: str, width: int):
    """Whether ``importance`` does it or ``prune``; on a CPU everything is fp32."""
    model = replace(LLAMA_8B, dtype=dtype)
    data: dict[str, Any] = {"path": "x", "seq_length": 4096, "global_batch_size": 8}
    files: dict[str, Any] = {"output_dir": "o", "checkpoint": "c"}
    alone = ImportanceConfig(**files, data=DataConfig(**data))
    inside = PruneConfig(**files, data=OptionalDataConfig(**data))
    for on_gpus in (True, False):
        jobs = [Job(cfg, model, None, 8, on_gpus) for cfg in (alone, inside)]
        assert [one.bf16 for one in jobs] == [on_gpus and dtype == "bfloat16"] * 2
        first, second = map(fullest_rank, jobs)
        assert first == second
        assert first.weights == (width if on_gpus else 4) * 8_030_261_248


@pytest.mark.parametrize("part", ["ddp", "transformer"])
def test_nothing_else_changes_memory(part):
    values = {"ddp": {"overlap_grad_reduce": True}, "transformer": {"bias_dropout_fusion": True}}
    assert memory(MegatronConfig(**{part: values[part]})) == memory()

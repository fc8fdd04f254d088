"""``minitron plan``: numbers of the papers, and what cannot run."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import yaml

from nemo_minitron.config import load, schema
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig, TeacherParallelConfig
from nemo_minitron.config.stages import (
    DistillConfig,
    FinetuneConfig,
    PipelineConfig,
    PlanConfig,
    PruningConfig,
    TargetConfig,
)
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.pipeline.plan import read_items
from nemo_minitron.planning.activations import Tokens, micro_batches_in_flight, stage
from nemo_minitron.planning.compute import built_teacher, forward_flops, work
from nemo_minitron.planning.items import plan_items, room
from nemo_minitron.planning.memory import Job, fullest_rank
from nemo_minitron.planning.models import target_model
from nemo_minitron.stages.finetune import flops_per_step
from tests.helpers.bad_input import run_line
from tests.helpers.tiny import GLM4_MOE, NEMOTRON_H

CONF = schema.conf_dir()
# Parameters in 1e9 to two digits, also where the papers print one: 2408.11796, table 3;
# 2407.14679, table 5.
PRINTED = {
    "llama31_minitron_4b_width": {"teacher": 8.03, "pruned": 4.51},
    "llama31_minitron_4b_depth": {"teacher": 8.03, "pruned": 4.54},
    "mistral_nemo_minitron_8b": {"pruned": 8.41},
    "minitron_15b_8b_4b": {"teacher": 15.63, "pruned_8b": 8.27, "pruned_4b": 4.19},
    "minitron_15b_4b": {"pruned": 4.19},
}
FINETUNE = ["finetune", "checkpoint=none", "data.path=x", "model=llama31_8b"]
FINETUNE_PLAN = ["plan", *FINETUNE, "parallel=tp8_sp"]
NEMOTRON_SIZES = {
    "15B": {},
    "8B": {"hidden_size": 4096, "ffn_hidden_size": 16384},
    "4B": {"hidden_size": 3072, "ffn_hidden_size": 9216, "num_attention_heads": 24},
}


def model(name: str, **sizes: Any) -> ModelConfig:
    values = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    return replace(ModelConfig(**values), **sizes)


def plan(*overrides: str) -> PlanConfig:
    cfg = load.compose("plan", list(overrides))
    assert isinstance(cfg, PlanConfig)
    return cfg


def planned(cfg: PlanConfig):
    return {item.name: item for item in plan_items(cfg, read_items(cfg, at_hand=False))}


@pytest.mark.parametrize(
    ("size", "total", "step_flops"), [("15B", 15.6, 4.4), ("8B", 8.27, 2.5), ("4B", 4.19, 1.2)]
)
def test_parameters_and_flops_of_a_step_of_2407_14679(size, total, step_flops):
    """Table 5, and the footnote on FLOPs per step (1152 samples of 4096 tokens)."""
    config = model("nemotron4_15b", **NEMOTRON_SIZES[size])
    digits = 1 if size == "15B" else 2
    count = parameter_count(family_of(config), config)["total"]
    assert round(count / 1e9, digits) == total
    assert round(3 * forward_flops(config, 4096) * 1152 * 4096 / 1e17, 1) == step_flops


EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_shipped_experiments_fit_their_machines(experiment):
    text = (CONF / "experiment" / f"{experiment}.yaml").read_text()
    named = re.search(r"minitron plan experiment=(\w+) (cluster=\w+ nodes=\d+)", text)
    assert (named is None) == experiment.startswith("quickstart")
    machine = ["cluster=cpu", "inputs.model=none"] if named is None else named[2].split()
    cfg = plan(f"experiment={experiment}", *machine)
    items = planned(cfg)
    assert all(room(item.run, cfg.cluster) for item in items.values() if item.run)
    for name, printed in PRINTED.get(experiment, {}).items():
        made = items[name].after
        assert round(parameter_count(family_of(made), made)["total"] / 1e9, 2) == printed


# Tokens, batch, sequence, peak and final learning rate, warm-up: 2408.11796, table 4 and section
# 2.1; 2407.14679, section 4.
PUBLISHED = {
    ("llama31_minitron_4b_width", "distilled"): (94e9, 1152, 8192, 1e-4, 1e-5, 40),
    ("llama31_minitron_4b_width", "corrected"): (100e9, 1152, 8192, 2e-5, 4.5e-7, 120),
    ("llama31_minitron_4b_depth", "distilled"): (94e9, 1152, 8192, 1e-4, 1e-5, 40),
    ("mistral_nemo_minitron_8b", "distilled"): (380e9, 768, 8192, 1e-4, 4.5e-7, 60),
    ("mistral_nemo_minitron_8b", "corrected"): (127e9, 768, 8192, 2e-5, 4.5e-7, 120),
    ("minitron_15b_8b_4b", "minitron_8b"): (94e9, 1152, 4096, 2e-4, 4.5e-7, 40),
    ("minitron_15b_8b_4b", "minitron_4b"): (94e9, 1152, 4096, 2e-4, 4.5e-7, 40),
    ("minitron_15b_4b", "distilled"): (94e9, 1152, 4096, 2e-4, 4.5e-7, 40),
    # Tokens of the model card; the rest is that of MN-Minitron 8B, the same budget.
    ("nemotron_h_8b_4b", "distilled"): (380e9, 768, 8192, 1e-4, 4.5e-7, 60),
    ("nemotron_nano_12b_9b", "distilled"): (94e9, 1152, 8192, 1e-4, 1e-5, 40),
}


@pytest.mark.parametrize(("experiment", "name"), PUBLISHED)
def test_training_is_as_published(experiment, name):
    items = read_items(plan(f"experiment={experiment}"), at_hand=False)
    cfg = next(item.config for item in items if item.name == name)
    assert isinstance(cfg, TrainingStageConfig)
    tokens, batch, length, lr, min_lr, warmup = PUBLISHED[experiment, name]
    assert (cfg.data.global_batch_size, cfg.data.seq_length) == (batch, length)
    assert (cfg.optim.lr, cfg.optim.min_lr, cfg.optim.lr_warmup_steps) == (lr, min_lr, warmup)
    assert cfg.trainer.max_steps * batch * length == pytest.approx(tokens, rel=1e-3)


def test_numbers_are_written(tmp_path):
    """Also: torch is not imported, and nothing else is written."""
    code = (
        "import sys; from nemo_minitron.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(code or any(m in sys.modules for m in ('torch', 'megatron', 'nemo')))"
    )
    line = ["plan", "experiment=llama31_minitron_4b_width", "json=plan.json", "nodes=32", "mfu=0.5"]
    command = [sys.executable, "-c", code, *line]
    done = subprocess.run(command, capture_output=True, timeout=100, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert "8,030,261,248" in done.stdout.decode()
    words = done.stdout.decode()  # GPU hours / GPUs, and what a run takes with all its waiting
    assert words.count("all steps, hours") == 1
    assert sorted(tmp_path.iterdir()) == [tmp_path / "plan.json"]
    values = json.loads((tmp_path / "plan.json").read_text())
    (run,) = [item for item in values["items"] if item["name"] == "distilled"]
    assert run["tokens"] == 9961 * 1152 * 8192
    assert run["parallel"]["data_parallel_size"] == 32
    # Student three times, teacher once; attention over 8192 positions; output layers included.
    student = model("llama31_8b", hidden_size=3072, ffn_hidden_size=9216)
    per_token = 3 * forward_flops(student, 8192) + forward_flops(model("llama31_8b"), 8192)
    assert run["flops"] == pytest.approx(per_token * run["tokens"])
    assert run["gpu_hours"] == pytest.approx(run["flops"] / (989e12 * 0.5) / 3600)
    ending = run_line([*FINETUNE_PLAN, f"json={tmp_path}/plan.json"])
    assert (ending.code, "set overwrite=true or another file" in ending.err) == (2, True)
    assert run_line([*FINETUNE_PLAN, f"json={tmp_path}/plan.json", "overwrite=true"]).code == 0
    ending = run_line([*FINETUNE_PLAN, f"json={tmp_path}", "overwrite=true"])
    assert (ending.code, ending.out) == (2, "")
    assert f"json={tmp_path} is a folder; set a file, such as json={tmp_path}/plan" in ending.err


def test_one_stage(tmp_path):
    line = ["plan", "importance", "checkpoint=none", "data.path=none", "parallel=tp8_sp"]
    ending = run_line([*line, "model=llama31_8b", "nodes=1", "output_dir=somewhere"])
    assert ending.code == 0, ending.err
    assert "importance" in ending.out
    ending = run_line([*line, "model=llama31_8b", "optim.lr=1"])
    assert ending.code == 2
    assert "optim.lr is not a key of importance" in ending.err


@pytest.mark.parametrize(
    "stage",
    [
        ["generate", "prompts=texts.txt"],
        ["benchmark", "new_tokens=8"],
        ["data", "data.blend=[1,a]", "total_tokens=100"],
    ],
)
def test_stages_that_depend_on_texts_are_said_to_be_left_out(stage):
    ending = run_line(["plan", *stage, "checkpoint=none", "model=llama31_8b", "output_dir=out"])
    assert ending.code == 0, ending.err
    assert "not counted" in ending.out
    assert f"│ {stage[0]}" in ending.out


@pytest.mark.parametrize("steps", [0, 10])
def test_a_search_that_trains_what_it_finds_is_left_out(tmp_path, steps):
    """Which candidates are trained is not known; every one runs over the samples once."""
    line = ["plan", "search", "checkpoint=none", "importance=none", "data.path=x", "nodes=1"]
    line += ["model=llama31_8b", "parallel=tp8_sp", "search.hidden_size=[2048,3072]"]
    line += ["data.num_samples=64", "data.seq_length=1024"]
    ending = run_line([*line, f"search.distill.steps={steps}", f"json={tmp_path}/plan.json"])
    assert ending.code == 0, ending.err
    (item,) = json.loads((tmp_path / "plan.json").read_text())["items"]
    assert ({"ranks", "fits", "gpu_hours"} <= item.keys()) == (steps == 0)
    assert ("not counted" in ending.out) == (steps > 0)
    reason = "it trains candidates that it has yet to find (search.distill.steps)"
    assert (reason in ending.out) == (steps > 0)
    if steps:
        assert item.keys() == {"name", "stage", "model", "result"}
    else:
        each = [forward_flops(model("llama31_8b", hidden_size=h), 1024) for h in (2048, 3072)]
        assert item["tokens"] == 2 * 64 * 1024
        assert item["flops"] == pytest.approx(64 * 1024 * sum(each))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["evaluate", "checkpoint=none", "data.path=x"], "choose model=<entry of conf/model>, or"),
        (["nodes=0"], "nodes=0 must be at least 1"),
        (["mfu=2"], "mfu=2.0 must be above 0 and at most 1"),
        (
            [*FINETUNE, "parallel=tp8_sp", "nodes=5"],
            "finetune (finetune): nodes=5 x cluster.gpus_per_node=8: data.global_batch_size=8 must "
            "be a multiple of",
        ),
        (
            [*FINETUNE, "parallel=tp8_sp", "cluster=cpu"],
            "finetune (finetune): nodes=1 x cluster.gpus_per_node=0: the launcher started 1 ranks "
            "but the layout (tensor x pipeline x context) needs a multiple of 8",
        ),
        ([*FINETUNE, "+model.hiden_size=8"], "unexpected keyword argument 'hiden_size'"),
        (["distill", "student=a", "teacher=b", "data.path=x", "model=llama31_8b"], "student=a"),
        (["stages=[{name: a, stage: plan}]"], "stage=plan makes no result"),
    ],
)
def test_what_cannot_run(overrides, says):
    ending = run_line(["plan", *overrides])
    assert ending.code == 2
    assert says in ending.err


def job(**keys) -> Job:
    """8B fine-tuned in bf16 on one replica of TP 8."""
    values = {
        "output_dir": "out",
        "checkpoint": "model",
        "data": DataConfig(path="x", seq_length=8192, global_batch_size=64),
        "parallel": ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True),
        "trainer": TrainerConfig(precision="bf16-mixed"),
        **keys,
    }
    return Job(FinetuneConfig(**values), model("llama31_8b"), None, 1, True)


def test_memory_of_weights_and_optimizer():
    """2 + 4 + 12 bytes a parameter (bf16, fp32 gradients, fp32 main weights and two moments)."""
    # Norms are on every rank, everything else is split eight ways.
    norms = 65 * 4096
    held = (8_030_261_248 - norms) / 8 + norms
    memory = fullest_rank(job())
    assert memory.weights == 2 * held
    assert memory.gradients == 4 * held
    assert memory.optimizer == 12 * held
    assert fullest_rank(replace(job(), data_parallel_size=4)).optimizer == 3 * held
    whole = job(optim=OptimConfig(use_distributed_optimizer=False))
    assert fullest_rank(replace(whole, data_parallel_size=4)).optimizer == 12 * held


def flops(job: Job) -> float:
    found = work(job).flops
    assert found is not None
    return found


def test_a_training_logs_the_operations_that_are_planned(tmp_path):
    """Of a step, recomputation apart."""
    teacher = replace(job().model, num_layers=4)
    (tmp_path / "t" / "checkpoint").mkdir(parents=True)
    teacher.save(tmp_path / "t" / "checkpoint")
    keys = {"data": job().cfg.data, "trainer": TrainerConfig(max_steps=7)}
    cfg = DistillConfig(output_dir="o", student="s", teacher=f"{tmp_path}/t", **keys)
    planned = flops(Job(cfg, job().model, teacher, 1, on_gpus=True))
    (of_a_step,) = flops_per_step(cfg, job().model)
    assert 7 * of_a_step == pytest.approx(planned)
    assert flops_per_step(job().cfg, job().model)[0] < planned / 7


def test_recomputation_trades_memory_for_work():
    full = TrainerConfig(
        precision="bf16-mixed",
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
    )
    plain, again = job(), job(trainer=full)
    # 32 layer inputs of 8192 x 4096 / 8 bf16 values, and one layer in full.
    inputs = 32 * 8192 * 4096 // 8 * 2
    assert fullest_rank(again).activations - inputs < fullest_rank(plain).activations / 16
    # Four passes for three, but for the output layer.
    tokens = work(plain).tokens
    assert tokens is not None
    output = 2 * 128256 * 4096 * tokens
    assert flops(again) - flops(plain) == pytest.approx(flops(plain) / 3 - output)


def test_a_block_is_recomputed_in_every_model_chunk():
    """Megatron counts from the first layer of each chunk: as many layers as twice the stages."""
    trainer = TrainerConfig(
        precision="bf16-mixed",
        recompute_granularity="full",
        recompute_method="block",
        recompute_num_layers=4,
    )
    pp2 = ParallelConfig(pipeline_model_parallel_size=2)
    vpp2 = replace(pp2, virtual_pipeline_model_parallel_size=2)
    plain, chunks = job(trainer=trainer, parallel=pp2), job(trainer=trainer, parallel=vpp2)
    once = job(parallel=pp2)
    assert flops(chunks) - flops(once) == pytest.approx(2 * (flops(plain) - flops(once)))
    eight = replace(trainer, recompute_num_layers=8)
    tokens = Tokens(8192, 2, fused=True)
    kinds = ["*-"] * 16
    held = [
        stage(plain.model, *one, kinds, 1)
        for one in ((vpp2, tokens, trainer), (pp2, tokens, eight))
    ]
    assert held[0] == held[1]


def test_layers_for_multi_token_prediction_are_counted_where_they_are_trained():
    """One layer more, a matrix that joins two states, and the output layer once more."""
    plain, length = GLM4_MOE, 64
    config = replace(plain, mtp_num_layers=1)
    more = forward_flops(config, length) - forward_flops(plain, length)
    deeper = plain.resized({}, [*range(plain.num_layers - 1)])
    last = forward_flops(plain, length) - forward_flops(deeper, length)
    joined, output = 2 * plain.hidden_size**2, plain.vocab_size * plain.hidden_size
    assert more == pytest.approx(last + 2 * (joined + output))
    distill = DistillConfig(output_dir="o", student="s", teacher="t", data=DataConfig(path="x"))
    assert built_teacher(distill, config, config) == config
    assert built_teacher(distill, plain, config) == plain
    apart = replace(distill, teacher_parallel=TeacherParallelConfig(own_ranks=1))
    assert built_teacher(apart, config, config) == plain


def test_what_a_training_refuses_for_multi_token_prediction_is_refused():
    words = ["plan", "finetune", "checkpoint=none", "data.path=x", "model=glm45_air"]
    words += ["+model.mtp_num_layers=1", "trainer.recompute_granularity=full"]
    words += ["trainer.recompute_method=uniform"]
    words += ["trainer.recompute_num_layers=2", "parallel.tensor_model_parallel_size=8", "nodes=8"]
    ending = run_line([*words, "parallel.sequence_parallel=true"])
    assert ending.code == 2
    assert "trainer.recompute_num_layers=2 with recompute_method=uniform is not" in ending.err


def test_micro_batches_in_flight():
    """1F1B fills the pipeline; interleaving holds more (Megatron's warm-up counts)."""
    pp4 = ParallelConfig(pipeline_model_parallel_size=4)
    assert [micro_batches_in_flight(pp4, stage, 100) for stage in range(4)] == [4, 3, 2, 1]
    assert micro_batches_in_flight(pp4, 0, 2) == 2
    vpp2 = replace(pp4, virtual_pipeline_model_parallel_size=2)
    assert [micro_batches_in_flight(vpp2, stage, 100) for stage in (0, 3)] == [11 / 2, 5 / 2]


@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["parallel.data_parallel_size=8"],
        [
            "parallel.pipeline_model_parallel_size=2",
            "parallel.virtual_pipeline_model_parallel_size=8",
        ],
    ],
)
def test_too_large_is_said_with_what_to_change(layout):
    """All keys are shown, whatever the width, also those that the new degrees rule out."""
    line = ["plan", "finetune", "checkpoint=none", "data.path=x", "model=nemotron4_15b"]
    line += ["trainer.precision=bf16-mixed", "data.seq_length=4096", "data.global_batch_size=64"]
    line += ["optim.use_distributed_optimizer=false", *layout]
    ending = run_line(line)
    assert ending.code == 0, ending.err
    advice = ending.out.partition("DOES NOT FIT")[2]
    keys = [word for word in advice.split() if "=" in word]
    assert "parallel.sequence_parallel=true" in keys
    better = run_line([*line, *keys])
    assert better.code == 0, better.err
    assert "DOES NOT FIT" not in better.out


def test_the_pipeline_warns_of_another_model(tmp_path, caplog):
    from nemo_minitron.families.llama import to_hf
    from nemo_minitron.planning.models import stated_model, warn_of_another_model

    stages = [{"name": "a", "stage": "import", "config": {"source": str(tmp_path)}}]
    cfg = PipelineConfig(
        output_dir="out",
        stages=stages,
        model=yaml.safe_load((CONF / "model" / "llama31_8b.yaml").read_text()),
    )
    (tmp_path / "config.json").write_text(json.dumps(to_hf(model("llama31_8b"))))
    warn_of_another_model(read_items(cfg), stated_model(cfg))
    assert not caplog.messages
    other = to_hf(model("llama31_8b", num_layers=28))
    (tmp_path / "config.json").write_text(json.dumps(other))
    warn_of_another_model(read_items(cfg), stated_model(cfg))
    assert "has num_layers=28" in caplog.text


def test_layers_that_scores_will_choose_are_a_like_share_of_every_kind(caplog) -> None:
    assert NEMOTRON_H.hybrid_layer_pattern == "M-M*MEM-"
    small = target_model(NEMOTRON_H, PruningConfig(target=TargetConfig(num_layers=5)))
    assert small.hybrid_layer_pattern == "M-M*E"
    assert "M - M * E, a like share of every kind" in caplog.text

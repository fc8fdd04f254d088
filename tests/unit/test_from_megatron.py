"""`minitron from-megatron`: argument lists of other programs as keys of this one."""

import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from nemo_minitron.cli import main
from nemo_minitron.config import load
from nemo_minitron.config.stages import FinetuneConfig, PlanConfig
from nemo_minitron.pipeline.plan import of_one_stage

DATA = Path(__file__).parents[1] / "data"
RECIPES = DATA / "recipes"


@pytest.fixture
def run(capsys):
    def run_line(*arguments: str):
        code = main(["from-megatron", *arguments])
        out, err = capsys.readouterr()
        return code, shlex.split(out), err

    return run_line


# File, what its user has to add, model, tensor x pipeline x context x data, what has no key.
PUBLIC = {
    "llama3_8b.sh": (
        ["--vocab-size", "128256"],
        {"family": "llama", "num_layers": 32, "hidden_size": 4096, "vocab_size": 128256},
        (1, 1, 1, 8),
        ("--fp8-format", "--mock-data", "--lr-decay-samples", "--save", "--apply-layernorm-1p"),
    ),
    "llama3_70b.txt": (
        [],
        {"family": "llama", "num_layers": 80, "hidden_size": 8192, "vocab_size": 128256},
        (4, 4, 2, 2),
        ("--init-method-std", "--hidden-dropout", "--wandb-project"),
    ),
    "mixtral_8x7b.sh": (
        ["--vocab-size", "32000"],
        {
            "family": "mixtral",
            "num_moe_experts": 8,
            "moe_ffn_hidden_size": 14336,
            "vocab_size": 32000,
        },
        (1, 4, 1, 8),
        ("--moe-aux-loss-coeff", "--data-path", "--lr-decay-iters", "--sequence-parallel"),
    ),
    "nemotron_15b.yaml": (
        [],
        {"family": "nemotron", "ffn_hidden_size": 24576, "activation": "squared_relu"},
        (8, 1, 1, None),
        ("--rampup-batch-size", "--data-cache-path", "--log-params-norm"),
    ),
    "qwen3_8b.sh": (
        [],
        {"family": "qwen3", "num_layers": 36, "qk_layernorm": True, "vocab_size": 151936},
        (4, 1, 1, None),
        ("--no-masked-softmax-fusion",),
    ),
}


@pytest.mark.parametrize("file", PUBLIC)
def test_a_public_recipe_composes_passes_plan_and_names_what_it_lacks(run, file, capsys):
    added, model, degrees, left = PUBLIC[file]
    source = [f"@{RECIPES / file}"] if file.endswith(".txt") else ["--file", str(RECIPES / file)]
    code, overrides, err = run(*source, *added)
    assert code == 0, err
    for name in left:
        assert f"# {name}: " in err
    paths = ["checkpoint=model", "output_dir=out", "data.path=text"]
    stage = [o for o in overrides if not o.startswith("+model.")]
    cfg = load.compose("finetune", [*paths[:2], *paths[2:], *stage])
    assert isinstance(cfg, FinetuneConfig)
    layout = cfg.parallel
    assert degrees == (
        layout.tensor_model_parallel_size,
        layout.pipeline_model_parallel_size,
        layout.context_parallel_size,
        layout.data_parallel_size,
    )
    planned = load.compose("plan", of_one_stage("finetune", [*paths, *overrides]))
    assert isinstance(planned, PlanConfig)
    assert model.items() <= planned.model.items()
    nodes = (layout.world_size() + 7) // 8
    assert main(["plan", "finetune", *paths, *overrides, f"nodes={nodes}"]) == 0
    assert "finetune" in capsys.readouterr().out


def test_values_are_those_of_the_recipe(run):
    _, overrides, _ = run("--file", str(RECIPES / "llama3_70b.txt"))
    for expected in (
        "parallel.virtual_pipeline_model_parallel_size=4",
        "parallel.sequence_parallel=true",
        "data.split=99/1/0",
        "data.global_batch_size=128",
        "trainer.max_steps=5000",
        "trainer.precision=bf16-mixed",
        "trainer.recompute_granularity=selective",
        "optim.lr=0.0003",
        "optim.lr_warmup_steps=500",
        "optim.adam_eps=1e-05",
        "megatron.ddp.overlap_grad_reduce=true",
        "megatron.transformer.attention_backend=flash",
    ):
        assert expected in overrides


def test_samples_become_steps_and_defaults_of_megatron_are_said(run):
    line = "--train-samples 1000 --global-batch-size 10 --lr-warmup-fraction 0.1 --lr 1e-3"
    _, overrides, _ = run(*line.split())
    for expected in (
        "trainer.max_steps=100",
        "optim.lr_warmup_steps=10",
        "optim.lr_decay_style=linear",
        "optim.min_lr=0.0",
        "optim.weight_decay=0.01",
        "optim.use_distributed_optimizer=false",
    ):
        assert expected in overrides


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--bf16 --fp16", "--bf16 and --fp16 contradict each other"),
        ("--train-iters 5 --train-samples 9", "--train-iters and --train-samples contradict"),
        ("--lr 1 --lr 2", "--lr is given twice, as 1 and as 2"),
        (
            "--num-layers 10 --pipeline-model-parallel-size 4 "
            "--num-layers-per-virtual-pipeline-stage 2",
            "--num-layers=10 must be a multiple of --pipeline-model-parallel-size=4",
        ),
        ("--lr 1e-4 --min-lr 1", "--min-lr=1 must lie between 0 and --lr=0.0001"),
        (
            "torchrun --nproc_per_node 8 x.py --tensor-model-parallel-size 3",
            "8 ranks (--nproc_per_node x --nnodes) are not a multiple",
        ),
        (
            "--nproc_per_node 8 --micro-batch-size 3 --global-batch-size 16",
            "--global-batch-size=16 must be a multiple of --micro-batch-size=3 x 8",
        ),
        ("--lr abc --train-iters 5", "--lr=abc must be a number"),
        ("--file nothing.sh", "nothing.sh: there is no such file"),
    ],
)
def test_contradictions_are_refused_by_name(run, line, message):
    code, overrides, err = run(*line.split())
    assert (code, overrides) == (2, [])
    assert message in err
    assert len(err.splitlines()) == 1


def test_sizes_that_do_not_fit_the_layout_are_refused(run):
    code, _, err = run(
        *("--file", str(RECIPES / "qwen3_8b.sh"), "--pipeline-model-parallel-size", "5")
    )
    assert code == 2
    assert "num_layers=36" in err
    assert "--pipeline-model-parallel-size" in err


def test_arguments_of_other_versions_are_listed(run):
    line = "--checkpoint-activations --external-cuda-graph --frobnicate 3 --num-layer 5"
    code, overrides, err = run(*line.split())
    assert (code, overrides) == (0, [])
    assert "# --checkpoint-activations: of another version of Megatron-LM: --recompute-" in err
    assert "# --external-cuda-graph: " in err
    assert "# --frobnicate: not known here" in err
    assert "did you mean --num-layers?" in err


def test_a_config_of_bridge(run, tmp_path):
    with tarfile.open(DATA / "foreign" / "bridge06.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    code, overrides, err = run("--file", str(next(tmp_path.rglob("run_config.yaml"))))
    assert code == 0, err
    for expected in ("optim.weight_decay=0.01", "+model.hidden_size=16", "+model.vocab_size=50"):
        assert expected in overrides
    stage = [o for o in overrides if not o.startswith("+model.")]
    load.compose("finetune", ["checkpoint=a", "output_dir=b", "data.path=c", *stage])


def test_the_keys_of_one_stage(run):
    _, overrides, _ = run("--stage", "evaluate", "--file", str(RECIPES / "llama3_70b.txt"))
    sections = {line.lstrip("+").partition(".")[0] for line in overrides}
    assert sections == {"parallel", "data", "megatron"}
    assert not [line for line in overrides if line.startswith("megatron.ddp")]


def test_torch_is_not_imported():
    code = (
        "import sys; from nemo_minitron.cli import main; "
        f"assert main(['from-megatron', '@{RECIPES / 'llama3_70b.txt'}']) == 0; "
        "assert not {'torch', 'megatron.core'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


SMALL = shlex.split(
    "--hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 8 --group-query-attention "
    "--num-query-groups 4 --swiglu --normalization RMSNorm --disable-bias-linear --bf16 "
    "--position-embedding-type rope --seq-length 64 --max-position-embeddings 64 --vocab-size 128"
)
EXPERTS = shlex.split(
    "--num-experts 4 --qk-layernorm --moe-ffn-hidden-size 32 --untie-embeddings-and-output-weights"
)


@pytest.mark.parametrize(
    ("more", "key", "entries"),
    [
        (["--no-rope-freq", "([0]*3+[1]*1)*2"], "no_rope_freq", [0, 0, 0, 1] * 2),
        (["--no-rope-freq", "4"], "no_rope_freq", [0, 0, 0, 1] * 2),
        ([*EXPERTS, "--moe-layer-freq", "([0]+[1])*4"], "moe_layer_freq", [0, 1] * 4),
    ],
)
def test_layers_as_an_expression(run, more, key, entries):
    """As Megatron-LM's recipes write them; it evaluates the text as Python."""
    code, lines, err = run("--num-layers", "8", *SMALL, *more)
    assert code == 0, err
    assert f"+model.{key}=[{','.join(map(str, entries))}]" in lines, err


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        (["--tokenizer-type", "NullTokenizer"], 128),
        (["--tokenizer-type", "NullTokenizer", "--null-tokenizer-eod-id", "5"], 128),
        (["--tokenizer-type", "NullTokenizer", "--legacy-tokenizer"], 129),
        (["--tokenizer-type", "NullMultimodalTokenizer"], 129),
        (["--tokenizer-type", "HuggingFaceTokenizer"], 128),
    ],
)
def test_tokens_of_a_tokenizer_without_words(run, more, tokens):
    """Since core 0.18, which no longer has --legacy-tokenizer, NullTokenizer adds none."""
    code, lines, err = run("--num-layers", "2", *SMALL, *more)
    assert code == 0, err
    assert f"+model.vocab_size={tokens}" in lines
    padded = [word.replace("--vocab-size", "--padded-vocab-size") for word in SMALL]
    _, lines, _ = run("--num-layers", "2", *padded, *more)
    assert "+model.vocab_size=128" in lines  # of the weights, whatever the tokenizer counts


@pytest.mark.parametrize(
    "text", ["([0]*1+[1]*7", "[1]*100000000", "[[1]*8]*8", "open('x')", "[1]*-1 or 8"]
)
def test_what_is_no_expression_of_layers(run, text):
    """Among them one with as many letters as there are layers."""
    code, lines, err = run(
        "--num-layers", str(len(text)), *SMALL, *EXPERTS, "--moe-layer-freq", text
    )
    assert code == 0
    assert not [line for line in lines if line.startswith("+model.")]
    assert f"--moe-layer-freq={text} must be a number, or lists with + and *" in err

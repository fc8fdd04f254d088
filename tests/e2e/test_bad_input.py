"""Every entry of the "bad input" list through the real command line: refused by the checks.

Each is refused within 5 s, in one line that names the key and the way out, with exit code 2, before
any model is built, leaving nothing behind and its inputs untouched.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.bad_input import (
    SECONDS,
    STAGES,
    build,
    contents,
    edited,
    line,
    resized,
    run_line,
    write_pair,
    write_scores,
)

READERS = ("importance", "evaluate", "distill")
TARGET = "pruning.target."
TP, PP = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Good inputs of every stage."""
    folder = tmp_path_factory.mktemp("home")
    build(folder)
    return folder


@pytest.fixture
def refuses(home, tmp_path):
    """Assert that a stage refuses its keys, and how."""

    def check(stage: str, *says: str, **changes: object) -> None:
        arguments = line(stage, home, tmp_path / "deep" / "out", **changes)
        before = contents(home, tmp_path)
        ending = run_line(arguments)
        assert ending.code == 2, ending.err
        assert len(ending.err.splitlines()) == 1
        for text in says:
            assert text in ending.err
        assert ending.seconds < SECONDS
        assert contents(home, tmp_path) == before

    return check


# ------------------------------------------------------------------------------- keys and sizes


def test_unknown_stage():
    ending = run_line(["distil", "student=x"])
    assert (ending.code, ending.err) == (
        2,
        "minitron: distil is not a stage; did you mean distill?\n",
    )


def test_a_value_that_is_nested_too_deep(refuses):
    deep = "[" * 100 + "]" * 100
    refuses("import", "source_ignore=[[[", "... is nested more than 40 deep", source_ignore=deep)


def test_a_reference_in_place_of_a_mapping(refuses):
    """OmegaConf takes any reference where a mapping belongs, and gives what it stands for."""
    says = (
        "megatron.transformer=5 must be a mapping of fields to values; set megatron.transformer.<"
    )
    refuses(
        "evaluate", says, **{"megatron.transformer": "${data.num_samples}", "data.num_samples": 5}
    )


@pytest.mark.parametrize("stage", STAGES)
def test_unknown_key(refuses, stage):
    refuses(stage, f"overwrit is not a key of {stage}; did you mean overwrite?", overwrit="true")


@pytest.mark.parametrize(
    ("name", "value", "current"),
    [
        ("num_layers", 5, 4),
        ("hidden_size", 65, 64),
        ("ffn_hidden_size", 97, 96),
        ("num_attention_heads", 9, 8),
        ("num_query_groups", 5, 4),
    ],
)
def test_target_larger_than_the_model(refuses, name, value, current):
    says = f"{TARGET}{name}={value} must be between 1 and {current}, the model's {name}; lower it"
    refuses("prune", says, **{TARGET + name: value})


def test_hidden_size_without_importance(refuses, home):
    says = "pruning.target.hidden_size=48 needs importance scores and importance is not set; set "
    keys = {TARGET + "hidden_size": 48, TARGET + "ffn_hidden_size": None}
    refuses("prune", says, **keys, importance=None)
    if not (home / "narrow").exists():
        write_scores(home / "narrow", home / "model", hidden=None)
    says = "needs 'hidden' scores, but importance holds only ['ffn', 'head', 'layer']; run minitron"
    refuses("prune", says, **keys, importance=home / "narrow")


def test_heads_not_divisible_by_query_groups(refuses, home, tmp_path):
    says = "num_attention_heads=6 after pruning must be a multiple of num_query_groups=4; set "
    refuses("prune", says, TARGET, **{TARGET + "num_attention_heads": 6})
    _with_config(home, tmp_path, num_attention_heads=7)
    says = "source: num_attention_heads=7 must be a multiple of num_query_groups=4"
    refuses("import", says, source=tmp_path / "hf")


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("[5]", "pruning.drop_layers holds [5], out of range: layers are counted from 1 to"),
        ("[0]", "pruning.drop_layers holds [0], out of range"),
        ("[2,3,2]", "pruning.drop_layers holds [2] more than once; list each layer once"),
        ("[1,2,3,4]", "pruning.drop_layers drops all 4 layers; leave at least one out"),
    ],
)
def test_drop_layers(refuses, value, says):
    refuses("prune", says, **{"pruning.drop_layers": value, TARGET + "ffn_hidden_size": None})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"search.num_attention_heads": "[3,5]"},
            "the search space is empty: no shape keeps this: num_attention_heads must be a",
        ),
        (
            {"search.target_params": 1000},
            "no shape of 2 meets search.target_params=1000 within 0.05; the nearest is num_layers=",
        ),
        ({"search.hidden_size": "[128]"}, "search.hidden_size holds 128, more than 64 of the"),
        (
            {"search.hidden_size": "[48]", "importance": None},
            "needs importance scores and importance is not set",
        ),
        ({"search.ffn_hidden_size": "[49]", TP: 2}, f"parallel.{TP.partition('.')[2]}=2"),
        (
            {"search.distill.steps": 2, "data.split_name": "train"},
            "data.split_name=train holds what search.distill.steps trains on; set data.split_name=",
        ),
        ({"search.distill.steps": 2, "search.distill.lr_warmup_steps": 2}, "lr_warmup_steps=2"),
        ({"search.distill.lr": 0.1}, "search.distill.lr=0.1 has no effect with search.distill.st"),
        ({"layer_criterion": "lm_loss"}, "layer_criterion=lm_loss chooses layers, but search.num"),
    ],
)
def test_search(refuses, changes, says):
    refuses("search", says, **changes)


# -------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("stage", READERS)
def test_layout_keys_reach_every_check(refuses, stage):
    refuses(stage, f"{TP}=3 must divide num_query_groups=4 of the model; use a divisor", **{TP: 3})
    keys = {PP: 2, VPP: 2, "data.global_batch_size": 3}
    refuses(stage, "virtual pipeline stages need a multiple of", **keys)
    keys = {"data.global_batch_size": 3, "data.micro_batch_size": 2}
    refuses(stage, "must be a multiple of data.micro_batch_size=2", **keys)


@pytest.mark.parametrize(
    ("sizes", "keys", "says"),
    [
        ({}, {TP: 3}, f"{TP}=3 must divide num_query_groups=4 of the model; use a divisor"),
        ({"ffn_hidden_size": 95}, {TP: 2}, f"{TP}=2 must divide ffn_hidden_size=95 of the model"),
        ({"vocab_size": 3}, {TP: 4}, f"{TP}=4 is larger than vocab_size=3 of the model; make it"),
        ({}, {PP: 3}, f"num_layers=4 cannot be split over {PP}=3"),
        ({"num_layers": 6}, {PP: 2, VPP: 2}, "num_layers=6 cannot be split over"),
        ({}, {VPP: 2}, f"{VPP}=2 needs at least 2 chunks and {PP} of at least 2; use null"),
        (
            {},
            {PP: 2, VPP: 2, "data.global_batch_size": 3},
            "data.global_batch_size=3 makes 3 micro-batches per model replica; virtual pipeline",
        ),
        (
            {},
            {"parallel.sequence_parallel": "true"},
            f"parallel.sequence_parallel=true needs {TP} of at least 2; set parallel.sequence_par",
        ),
        (
            {},
            {"data.global_batch_size": 3, "data.micro_batch_size": 2},
            "data.global_batch_size=3 must be a multiple of data.micro_batch_size=2 x data-parallel"
            " size 1; set data.global_batch_size to a multiple of 2",
        ),
        (
            {},
            {"data.global_batch_size": 3, "parallel.data_parallel_size": 2},
            "data-parallel size 2; set data.global_batch_size to a multiple of 2, or run it on a "
            "data-parallel size that divides its 3 micro-batches: 1, 3",
        ),
    ],
)
def test_layout_that_does_not_fit(refuses, home, tmp_path, sizes, keys, says):
    model = home / "model"
    if sizes:
        model = edited(model, tmp_path / "sized", resized(**sizes))
    refuses("evaluate", says, checkpoint=model, **keys)


@pytest.mark.parametrize("key", ["student", "teacher"])
def test_layout_names_the_model_it_does_not_fit(refuses, home, tmp_path, key):
    model = edited(home / "model", tmp_path / "sized", resized(ffn_hidden_size=95))
    refuses("distill", f"{key}={model}: {TP}=2 must divide", **{key: model, TP: 2})


@pytest.mark.parametrize("stage", READERS)
def test_world_size_that_does_not_fit(refuses, monkeypatch, stage):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    says = "the launcher started 3 ranks but the layout (tensor x pipeline x context) needs a "
    refuses(stage, says, "multiple of 2; change the launcher or the parallel.* keys", **{TP: 2})


# ----------------------------------------------------------------------------------------- data


def _no_data(folder: Path) -> Path:
    return folder / "nowhere"


def _empty_text(folder: Path) -> Path:
    (folder / "x.txt").touch()
    return folder / "x.txt"


def _blank_text(folder: Path) -> Path:
    (folder / "x.txt").write_text("\n\n  \n\n")
    return folder / "x.txt"


def _empty_jsonl(folder: Path) -> Path:
    (folder / "x.jsonl").write_text('{"text": ""}\n')
    return folder / "x.jsonl"


def _folder_without_text(folder: Path) -> Path:
    (folder / "x").mkdir()
    return folder / "x"


def _no_rows(folder: Path) -> Path:
    np.save(folder / "x.npy", np.zeros((0, 16), np.int64))
    return folder / "x.npy"


def _empty_pair(folder: Path) -> Path:
    write_pair(folder / "x", [])
    return folder / "x"


def _short_text(folder: Path) -> Path:
    (folder / "x.txt").write_text("one\n\ntwo\n\nthree")
    return folder / "x.txt"


def _short_rows(folder: Path) -> Path:
    np.save(folder / "x.npy", np.zeros((4, 15), np.int64))
    return folder / "x.npy"


def _short_pair(folder: Path) -> Path:
    write_pair(folder / "x", [5, 5, 5])
    return folder / "x"


@pytest.mark.parametrize("stage", READERS)
def test_data_keys_reach_every_check(refuses, tmp_path, stage):
    for write, says in ((_no_data, "does not exist"), (_short_text, "less than one sequence")):
        keys = {"data.path": write(tmp_path), "data.split": "'100,0,0'", "data.num_samples": None}
        keys |= {} if stage == "distill" else {"data.split_name": "train"}
        refuses(stage, "data.path=", says, **keys)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (_no_data, "nowhere does not exist; set data.path to a file of one of the forms .txt"),
        (_empty_text, "holds no documents: every text in it is empty"),
        (_blank_text, "holds no documents: every text in it is empty"),
        (_empty_jsonl, "holds no documents: every text in it is empty"),
        (_folder_without_text, "is a folder without a file of the forms .txt .jsonl"),
        (_no_rows, "has shape [0, 16]; it must be [samples, data.seq_length] with at least one"),
        (_empty_pair, "holds no documents"),
        (_short_text, "less than one sequence of data.seq_length=16 plus one; lower data.seq_len"),
        (_short_rows, "holds rows of 15 tokens but data.seq_length=16; set data.seq_length=15"),
        (_short_pair, "less than one sequence of data.seq_length=16 plus one; lower data.seq_len"),
    ],
)
def test_missing_empty_and_short_data(refuses, tmp_path, write, says):
    keys = {"data.split": "'100,0,0'", "data.split_name": "train", "data.num_samples": None}
    refuses("evaluate", "data.path=", says, **keys, **{"data.path": write(tmp_path)})


# ---------------------------------------------------------------------------------- checkpoints


def _no_manifest(result: Path) -> None:
    (result / "manifest.json").unlink()


def _truncated(result: Path) -> None:
    file = _largest(result)
    file.write_bytes(file.read_bytes()[:-9])


def _changed(result: Path) -> None:
    file = _largest(result)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _largest(result: Path) -> Path:
    files = [path for path in result.rglob("*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        ("importance", "checkpoint"),
        ("prune", "checkpoint"),
        ("prune", "importance"),
        ("distill", "student"),
        ("distill", "teacher"),
        ("evaluate", "checkpoint"),
        ("export", "checkpoint"),
    ],
)
@pytest.mark.parametrize(
    ("damage", "says", "way_out"),
    [
        (_no_manifest, "is not a complete result (manifest.json is missing)", "run that stage"),
        (_truncated, " is truncated (", "restore the file, or run '"),
        (_changed, " is changed (its sha256 differs)", "again with overwrite=true"),
        (shutil.rmtree, "does not exist", "give the folder that the right stage wrote as its"),
    ],
)
def test_damaged_result(refuses, home, tmp_path, stage, key, damage, says, way_out):
    result = shutil.copytree(home / ("scores" if key == "importance" else "model"), tmp_path / "in")
    damage(result)
    refuses(stage, f"{key}={result}", says, way_out, **{key: result})


@pytest.mark.parametrize(
    ("stage", "key", "given", "needs"),
    [
        ("importance", "checkpoint", "scores", "checkpoint/model.yaml"),
        ("prune", "checkpoint", "scores", "checkpoint/model.yaml"),
        ("prune", "importance", "model", "scores.json"),
        ("distill", "student", "scores", "checkpoint/model.yaml"),
        ("distill", "teacher", "scores", "checkpoint/model.yaml"),
        ("evaluate", "checkpoint", "scores", "checkpoint/model.yaml"),
        ("export", "checkpoint", "scores", "checkpoint/model.yaml"),
    ],
)
def test_result_of_the_wrong_stage(refuses, home, stage, key, given, needs):
    refuses(stage, f"{key}={home / given} is a result of", needs, **{key: home / given})


def test_layer_maps_out_of_range(refuses):
    losses = {"distillation.intermediate.losses": "[block_output]"}
    key = "distillation.intermediate.layer_map"
    refuses(
        "distill",
        f"{key}=[[99, 0]]: teacher layer 99",
        "layers 0 to ",
        **losses,
        **{key: "[[99,0]]"},
    )
    refuses(
        "distill",
        f"{key}=[[0, 99]]: student layer 99",
        "layers 0 to ",
        **losses,
        **{key: "[[0,99]]"},
    )
    refuses(
        "distill", "student layer 0 more than", "one teacher", **losses, **{key: "[[0,0],[1,0]]"}
    )


def test_student_and_teacher_of_different_vocabularies(refuses, home, tmp_path):
    larger = edited(home / "model", tmp_path / "larger", resized(vocab_size=999))
    says = "set student= and teacher= to models of one tokenizer"
    refuses("distill", "teacher has 999", says, teacher=larger)

    def swap(folder: Path) -> None:
        for path in (folder / "tokenizer").rglob("tokenizer.json"):  # as_read/ too
            values = json.loads(path.read_text())
            vocab = values["model"]["vocab"]
            vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
            path.write_text(json.dumps(values))

    other = edited(home / "model", tmp_path / "other", swap)
    says = "different vocabularies: 2 ids stand for other tokens, such as "
    refuses("distill", says, "set student and teacher to models of one", student=other)


def test_distillation_keys_that_do_not_fit(refuses):
    top_k = {"distillation.loss": "top_k", "distillation.top_k": 9999}
    says = "distillation.top_k=9999 is larger than the vocabulary of "
    refuses("distill", says, "set distillation.top_k to ", **top_k)
    keys = {"distillation.temperature": 0}
    refuses("distill", "distillation.temperature=0.0 must be above 0", **keys)


# ------------------------------------------------------------------------------- Hugging Face in


def _with_config(home: Path, tmp_path: Path, **values: object) -> None:
    shutil.copytree(home / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_unknown_architecture(refuses, home, tmp_path):
    _with_config(home, tmp_path, architectures=["BloomForCausalLM"])
    says = "source: architectures=['BloomForCausalLM'] in config.json is not supported; supported: "
    refuses("import", says, "set source to such a model", source=tmp_path / "hf")


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_nan_in_the_source(refuses, home, tmp_path, value):
    shutil.copytree(home / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float(value)
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    says = "model.layers.1.mlp.up_proj.weight holds 1 NaN or infinite values of 6144; the weights"
    refuses("import", says, "set source to an intact copy", source=tmp_path / "hf")


INDEX = "model.safetensors.index.json"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def sharded(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good model in several files."""
    from transformers import LlamaForCausalLM

    folder = shutil.copytree(home / "hf", tmp_path_factory.mktemp("sharded") / "hf")
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(home / "hf").save_pretrained(folder, max_shard_size="100KB")
    return folder


def _index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def _with_index(folder: Path, **entries: str) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {**_index(folder), **entries}}))


def _with_tensors(folder: Path, **changed: torch.Tensor) -> None:
    """Change tensors, or add them to the file of the last norm."""
    for name, tensor in changed.items():
        path = folder / _index(folder).get(name, _index(folder)[NORM])
        save_file({**load_file(path), name: tensor}, path)
        _with_index(folder, **{name: path.name})


def _configured(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def _truncate(folder: Path) -> None:
    path = folder / _index(folder)[NORM]
    path.write_bytes(path.read_bytes()[:-7])


def _quantised(folder: Path) -> None:
    """Weights of bitsandbytes without the config that says so."""
    _with_tensors(folder, **{"model.layers.0.mlp.down_proj.weight": torch.ones(64, 96).char()})


def _half(folder: Path) -> None:
    _with_tensors(folder, **{"model.layers.0.mlp.down_proj.weight": torch.ones(64, 96).half()})


_DAMAGES = [
    (lambda f: (f / _index(f)[NORM]).unlink(), [".safetensors is missing although " + INDEX]),
    (lambda f: _with_index(f, **{NORM: _index(f)["lm_head.weight"]}), ["disagree", NORM]),
    (lambda f: (f / INDEX).write_text("{}"), [INDEX + " holds no weight_map"]),
    (_truncate, [".safetensors is truncated or damaged"]),
    (
        lambda f: _with_tensors(f, **{"model.layers.1.mlp.up_proj.bias": torch.ones(96)}),
        ["1 tensors have no row", "'model.layers.1.mlp.up_proj.bias'", ".safetensors)"],
    ),
    (
        lambda f: _with_tensors(f, **{NORM: torch.ones(64).double()}),
        [f".safetensors: {NORM} is F64; supported: ['BF16', 'F16', 'F32']"],
    ),
    (_half, [".safetensors: model.layers.0.mlp.down_proj.weight is torch.float16 although"]),
    (_quantised, ["model.layers.0.mlp.down_proj.weight is I8; supported:", "not quantised"]),
    *(
        (
            lambda f, method=method: _configured(f, quantization_config={"quant_method": method}),
            ["config.json: quantization_config", f"quant_method={method}", "set source to the unq"],
        )
        for method in ("gptq", "fp8", "bitsandbytes")
    ),
    (
        lambda f: _configured(f, num_hidden_layers=3),
        ["model.layers.3.", "num_hidden_layers=3 in config.json, but the weights are of 4 layers"],
    ),
    (
        lambda f: _configured(f, num_hidden_layers=5),
        ["model.layers.4.", "num_hidden_layers=5 in config.json, but the weights are of 4 layers"],
    ),
    (
        lambda f: _configured(f, vocab_size=7),
        [".safetensors: model.embed_tokens.weight has shape (", "asks for (7, 64) (vocab, hidden)"],
    ),
]


@pytest.mark.parametrize(("damage", "says"), _DAMAGES)
def test_damaged_source(refuses, sharded, tmp_path, damage, says):
    """The refusal names what is wrong, and nothing half-written stays."""
    source = shutil.copytree(sharded, tmp_path / "hf")
    damage(source)
    refuses("import", "source: ", *says, source=source)


@pytest.mark.parametrize("key", ["checkpoint", "data.path", "output_dir"])
def test_a_name_that_no_file_can_have(refuses, home, key):
    """The file system refuses it; that is wrong input, not a failure of the stage."""
    refuses("evaluate", "File name too long: ", **{key: f"{home}/{'x' * 5000}"})


def test_gguf_kind_that_cannot_be_read(refuses, tmp_path):
    from gguf import GGMLQuantizationType as Kind

    from tests.helpers.gguf_fixtures import llama, write_gguf

    name, raw = "blk.1.attn_q.weight", np.zeros((64, 36), np.uint8)
    write_gguf(
        tmp_path / "model.gguf",
        llama(),
        drop="layers.1.self_attn.q_proj",
        raw={name: (raw, Kind.IQ4_NL)},
    )
    says = f"model.gguf: {name} is IQ4_NL; supported: "
    refuses("import", says, source=tmp_path / "model.gguf")


# --------------------------------------------------------------------------- as real processes

# Says what was imported too: checks must not pay for Megatron, nor a cluster for a typing mistake.
_PROCESS = """
import sys
from nemo_minitron.cli import main
code = main(sys.argv[1:])
print(sorted({"torch", "megatron", "nemo"} & set(sys.modules)))
sys.exit(code)
"""


def _process(arguments: list[str]) -> tuple[int, str, str, float]:
    """Exit code, output, errors and seconds of a process; the best of three where it was slow.

    On a busy machine its CPU time counts, which is all it would take on an idle one.
    """
    words = [sys.executable, "-c", _PROCESS, *arguments]
    runs = [_timed(words)]
    while runs[-1][3] >= SECONDS and len(runs) < 3:
        runs.append(_timed(words))
    return min(runs, key=lambda run: run[3])


def _seconds_of_torch() -> float:
    """Return the seconds of a process that only imports torch."""
    return _timed([sys.executable, "-c", "import torch"])[3]


def _timed(words: list[str]) -> tuple[int, str, str, float]:
    start = time.monotonic()
    child = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    before = psutil.Process().cpu_times()
    out, err = child.communicate(timeout=60)
    after = psutil.Process().cpu_times()
    cpu = after.children_user + after.children_system
    cpu -= before.children_user + before.children_system
    return child.returncode, out, err, min(time.monotonic() - start, cpu)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("stage", "key", "says"),
    [
        ("importance", "checkpoint", "is changed (its sha256 differs)"),
        ("prune", "checkpoint", "is changed (its sha256 differs)"),
        ("distill", "teacher", "is changed (its sha256 differs)"),
        ("evaluate", "checkpoint", "is changed (its sha256 differs)"),
        ("export", "checkpoint", "is changed (its sha256 differs)"),
        ("import", "source", "holds 1 NaN or infinite values"),
    ],
)
def test_as_a_process_of_its_own(home, tmp_path, stage, key, says):
    """The slowest refusal of every stage, process start included."""
    given = shutil.copytree(home / ("hf" if stage == "import" else "model"), tmp_path / "in")
    if stage == "import":
        tensors = load_file(given / "model.safetensors")
        tensors["lm_head.weight"][0, 0] = torch.nan
        save_file(tensors, given / "model.safetensors", metadata={"format": "pt"})
    else:
        _changed(given)
    before = contents(home, tmp_path)
    arguments = line(stage, home, tmp_path / "out", **{key: given})
    code, out, err, seconds = _process(arguments)
    assert code == 2, err
    assert err.startswith(f"minitron {stage}: ")
    assert says in err
    assert len(err.splitlines()) == 1
    # Import reads weights itself, in torch, which alone takes three seconds or more.
    assert out == ("['torch']\n" if stage == "import" else "[]\n")
    assert seconds < SECONDS or (stage == "import" and seconds < 2 * _seconds_of_torch())
    assert contents(home, tmp_path) == before

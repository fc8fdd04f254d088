"""Blends: how they are written, what is refused, and Megatron's order of their samples."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint.artifact import _resumes
from nemo_minitron.config import load
from nemo_minitron.config.blend import check_trained, parse_blend
from nemo_minitron.config.identity import changes, config_values, input_paths
from nemo_minitron.config.phases import parse_phases, phases_of
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.data.blend import BlendedSamples, blend_order, order_of
from nemo_minitron.data.checks import check_data
from nemo_minitron.data.datasets import stage_dataset, training_datasets
from tests.helpers.data_fixtures import make_texts, save_tokenizer, write_jsonl, write_pair
from tests.helpers.tiny import LLAMA

WEIGHTS = [0.1, 0.25, 0.05, 0.4, 0.2]
SEQ = 16
TWO = [{"weight": 0.3, "path": "a"}, {"weight": 0.7, "path": "b"}]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    return [write_pair(folder / f"s{i}", 20 + 10 * i, seed=i) for i in range(5)]


def _config(stage, line) -> Any:
    return load.compose(stage, line)


def blend_config(paths, weights=WEIGHTS, **keys):
    sources = [{"weight": w, "path": p} for w, p in zip(weights, paths, strict=True)]
    values = {"seq_length": SEQ, "split": "80/10/10", "global_batch_size": 8, **keys}
    return DataConfig(path="", blend=sources, **values)


# ------------------------------------------------------------------------------------ ways to write


def test_every_way_to_write_a_blend_is_the_same(tmp_path):
    (tmp_path / "list.yaml").write_text("- {weight: 0.3, path: a}\n- {weight: 0.7, path: b}\n")
    (tmp_path / "words.yml").write_text("[0.3, a, 0.7, b]")
    files = [str(tmp_path / "list.yaml"), str(tmp_path / "words.yml")]
    for way in (TWO, [0.3, "a", 0.7, "b"], ["0.3", "a", "0.7", "b"], "0.3 a 0.7 b", *files):
        assert parse_blend(way) == TWO
    (tmp_path / "list.yaml").rename(tmp_path / "blend.yaml")
    data = DataConfig(path=str(tmp_path / "blend.yaml"))
    assert (data.path, data.blend) == ("", TWO)
    phases = parse_phases([{"steps": 1, "data": {"path": str(tmp_path / "blend.yaml")}}])
    assert phases == [{"steps": 1, "data": {"blend": TWO}}]
    zero = [*TWO, {"weight": 0, "path": "c"}]
    assert parse_blend(zero) == TWO == parse_blend(TWO)


def test_a_phase_names_one_source_as_a_stage_does():
    """A key of a phase that nothing would read is a mistake there, too."""
    data = DataConfig(path="x")
    for own, says in (
        ({"path": "a", "blend": TWO}, r"path=a and trainer\.phases\.0\.data\.blend are both set"),
        ({"path": "m.yaml", "blend": TWO}, r"path=m\.yaml and trainer.* are both set"),
        ({"path": "a", "blend_max_epochs": 2.0}, r"blend_max_epochs=2\.0 is for data\.blend"),
    ):
        phases: list[dict[str, Any]] = [{"steps": 2, "data": own}]
        with pytest.raises(ValueError, match=rf"trainer\.phases\.0\.data\.{says}"):
            phases_of(data, TrainerConfig(max_steps=2, phases=phases))
    blended = DataConfig(path="", blend=TWO, blend_max_epochs=2.0)
    phases = [{"steps": 1}, {"steps": 1, "data": {"path": "a"}}]
    first, second = phases_of(blended, TrainerConfig(max_steps=2, phases=phases))
    assert (first.data.blend, second.data.path, second.data.blend) == (TWO, "a", None)


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ([0.3, "a", -0.7, "b"], r"data.blend.1.weight=-0.7 of path=b must be .* not negative"),
        ([float("nan"), "a"], r"data.blend.0.weight=nan"),
        ([0, "a", 0.0, "b"], r"data.blend has 2 weights that are all 0; set one above 0"),
        ([0.3, "a", "b"], r"data.blend=.* has 1 weights and 2 paths; give a weight before each"),
        ("0.3 a 0.7", r"has 2 weights and 1 paths"),
        (["a", "b"], r"has 0 weights and 2 paths"),
        ([{"path": "a"}], r"data.blend.0=.* must have weight and path"),
        ([{"weight": True, "path": "a"}], r"data.blend.0.weight=True"),
        ([{"weight": 1, "path": ["a"]}], r"data.blend.0.path=\['a'\] must be a path"),
        ([0.7, "web.yaml", 0.3, "b"], r"data.blend.0.path=web.yaml is a list of sources itself"),
        ([0.3, "a", 0.7, "a"], r"data.blend names a twice; name it once, with the sum"),
        ([], r"data.blend=\[\] must be a list of"),
        ("a", r"data.blend=a must be a list of"),
        ("none.yaml", r"data.blend=none.yaml does not exist; it must be"),
    ],
)
def test_what_is_no_blend_is_refused(blend, message):
    with pytest.raises(ValueError, match=message):
        parse_blend(blend)


def test_on_the_command_line():
    line = ["checkpoint=c", "output_dir=o"]
    for way in ("data.blend=[0.3,a,0.7,b]", "data.blend='0.3 a 0.7 b'"):
        assert _config("finetune", [*line, way]).data.blend == TWO
    cfg = _config("finetune", [*line, load.override("data.blend", TWO)])
    assert cfg.data.blend == TWO
    assert cfg.data.path == ""
    cfg = _config("evaluate", [*line, load.override("data.blend", TWO)])
    assert cfg.data.given
    with pytest.raises(ValueError, match=r"data.path=x and data.blend are both set"):
        _config("finetune", [*line, "data.path=x", load.override("data.blend", TWO)])
    with pytest.raises(ValueError, match=r"finetune needs data.path; add data.path="):
        _config("finetune", line)
    with pytest.raises(ValueError, match=r"data.blend_max_epochs=2.0 is for data.blend"):
        _config("finetune", [*line, "data.path=x", "data.blend_max_epochs=2"])


def test_weights_count_and_paths_are_inputs():
    line = ["checkpoint=c", "output_dir=o"]
    plain = _config("finetune", [*line, "data.path=x"])
    assert not [key for key in config_values(plain) if "blend" in key]
    cfg = _config("finetune", [*line, load.override("data.blend", TWO)])
    paths = {"data.blend.0.path": "a", "data.blend.1.path": "b"}
    assert input_paths(cfg) == {"checkpoint": "c", **paths}
    stored = config_values(cfg)
    assert stored["data.blend"] == [0.3, 0.7]
    moved = [{**source, "path": f"new/{source['path']}"} for source in TWO]
    same = _config("finetune", [*line, load.override("data.blend", moved)])
    assert changes(same, stored) == {}
    other = _config("finetune", [*line, "data.blend=[0.4,a,0.6,b]"])
    assert changes(other, stored, resuming=True) == {"data.blend": ([0.3, 0.7], [0.4, 0.6])}
    assert changes(plain, config_values(plain)) == {}


CHANGE = {"step": 3, "weights": [0.5, 0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{"step": 3}], r"data.blend_changes.0=.* must have step and a list of weights"),
        ([{"step": 0, "weights": [1, 1]}], r"blend_changes.0.step=0 must be a number of steps"),
        ([CHANGE, CHANGE], r"blend_changes.1.step=3 must be a number of steps above 3"),
        ([{"step": 3, "weights": [1]}], r"blend_changes.0.weights=\[1\] must be 2 numbers"),
        ([{"step": 3, "weights": [1, -1]}], r"must be 2 numbers that are not negative"),
        ([{"step": 3, "weights": [0, 0]}], r"blend_changes.0.weights=\[0, 0\] are all 0"),
    ],
)
def test_what_is_no_change_of_weights_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(path="", blend=TWO, blend_changes=changes)


def test_changes_of_weights_are_for_training_alone(pairs):
    with pytest.raises(ValueError, match=r"data.blend_changes=.* is for data.blend, which is not"):
        DataConfig(path="a", blend_changes=[CHANGE])
    data = blend_config(pairs, blend_changes=[{"step": 3, "weights": [1, 1, 1, 1, 1]}])
    _refused(data, r"names steps of a training, and this stage has none", splits=None)
    _refused(data, r"weights from step 3 on, and training ends at .*=3", train_samples=24)
    check_data(data, splits=("train",), vocab_size=101, train_samples=32)
    more = replace(data, blend_max_epochs=2)
    _refused(more, r"data.blend.0.path=.* its share of 8000 is 1598: .* epochs", train_samples=8000)


def test_a_run_may_go_on_with_a_change_of_weights(tmp_path):
    line = ["checkpoint=c", "output_dir=o", "data.blend=[0.3,a,0.7,b]"]
    plain = _config("finetune", line)
    told = _config("finetune", [*line, load.override("data.blend_changes", [CHANGE])])
    assert changes(told, config_values(plain), resuming=True) == {}
    key = "data.blend_changes"
    assert changes(told, config_values(plain)) == {key: (None, [CHANGE])}
    stored = _config("teacher_logits", [*line, "top_k=2"])
    other = replace(stored, data=replace(stored.data, blend_changes=[CHANGE]))
    assert changes(other, config_values(stored), resuming=True) == {key: (None, [CHANGE])}
    other = _config("finetune", [*line[:2], "data.blend=[0.4,a,0.6,b]"])
    owner = {"stage": "finetune", "config": config_values(plain), "inputs": {}}
    says = r"data.blend \[0.3, 0.7\] -> \[0.4, 0.6\].*; data.blend_changes has weights from a step"
    with pytest.raises(ValueError, match=says):
        _resumes(other, tmp_path, owner, {**owner, "config": config_values(other)})
    assert _resumes(told, tmp_path, owner, {**owner, "config": config_values(told)})
    check_trained([], [CHANGE], 3)
    with pytest.raises(ValueError, match=r"has none before step 4, and .* trained so far with \["):
        check_trained([CHANGE], [], 4)


def test_order_with_changes_of_weights():
    """Each phase is a blend of its own, and no source reads a sample twice or leaves one out."""
    order = order_of([([1, 2, 1], 40), ([0, 1, 3], 80), ([1, 0, 0], 8)])
    assert [
        np.bincount(part, minlength=3).tolist() for part in np.split(order.source, [40, 120])
    ] == [[10, 20, 10], [0, 20, 60], [8, 0, 0]]
    assert all(
        order.sample[order.source == i].tolist() == list(range(count))
        for i, count in enumerate((18, 40, 70))
    )
    first = blend_order([1, 2, 1], 40)
    assert np.array_equal(order.source[:40], first.source)


# ----------------------------------------------------------------------------------------- samples


def _train(data, steps, tmp_path, model=LLAMA, **trainer):
    keys = TrainerConfig(max_steps=steps, **{"limit_val_batches": 0, **trainer})
    splits = ("train", "validation") if keys.limit_val_batches else ("train",)
    return training_datasets(data, keys, model, tmp_path, str(tmp_path / "out"), splits)


def test_shares_and_sequence_are_megatrons(pairs, tmp_path):
    """Against its own builder, set up as Megatron-LM does it."""
    from megatron.core.datasets import blended_megatron_dataset_builder as builder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    from nemo_minitron.data.gpt import _Tokenizer

    data, size = blend_config(pairs), 2000
    train, _ = _train(data, size // 8, tmp_path)
    assert len(train) == size
    shares = np.bincount(train.order.source, minlength=5) / size
    assert np.abs(shares - np.array(WEIGHTS)).max() < 0.005

    # It leaves a folder of its own beside each pair.
    theirs = [shutil.copy(f"{pair}.bin", tmp_path) for pair in pairs]
    prefixes = [str(Path(path).with_suffix("")) for path in theirs]
    for pair in pairs:
        shutil.copy(f"{pair}.idx", tmp_path)
    config = GPTDatasetConfig(
        random_seed=data.seed,
        sequence_length=SEQ,
        blend=(prefixes, WEIGHTS),
        split="80,10,10",
        path_to_cache=None,
        tokenizer=_Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # Validation and test must have a size there; they do not enter the training samples.
    built = builder.BlendedMegatronDatasetBuilder(GPTDataset, [size, 8, 8], lambda: True, config)
    blended = built.build()[0]
    for index in range(size):
        sample = blended[index]
        assert sample["dataset_id"] == train.order.source[index]
        assert torch.equal(sample["tokens"], train[index]["tokens"])
        assert torch.equal(sample["labels"], train[index]["labels"])


def test_epochs_are_counted(pairs, tmp_path, caplog):
    caplog.set_level("INFO")
    train, _ = _train(blend_config(pairs), 250, tmp_path)
    assert "data.blend, source 3_s3: 800 of 2000 samples" in caplog.text
    counts = np.bincount(train.order.source[:1000], minlength=5)
    wanted = dict(zip(train.names, (counts / np.array(train.held)).tolist(), strict=True))
    assert train.epochs(1000) == pytest.approx(wanted)
    assert train.epochs(500)["0_s0"] == pytest.approx(50 / train.held[0], abs=2 / train.held[0])
    assert float(train[None]["loss_mask"].sum()) == 0


def test_validation_and_calibration_read_each_sample_once(pairs, tmp_path, caplog):
    data = blend_config(pairs)
    _, validation = _train(data, 4, tmp_path, limit_val_batches=100)
    found = list(zip(*map(np.ndarray.tolist, validation.order), strict=True))
    assert 5 <= len(found) == len(set(found)) < 800
    assert f"validation reads {len(found)} samples, not 800" in caplog.text
    some = replace(data, num_samples=20)
    samples = stage_dataset(some, LLAMA, tmp_path, str(tmp_path / "out"))
    assert isinstance(samples, BlendedSamples)
    assert np.bincount(samples.order.source).tolist() == [2, 5, 1, 8, 4]
    many = replace(data, num_samples=1000)
    with pytest.raises(
        ValueError, match=r"data.blend.0.path=.* epochs, more than data.num_samples"
    ):
        stage_dataset(many, LLAMA, tmp_path, str(tmp_path / "out"))


def test_sources_of_every_form(pairs, tmp_path):
    texts = make_texts(90)
    vocab = save_tokenizer(tmp_path / "tokenizer", texts)
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "er" / "a.jsonl", texts[:40])
    (tmp_path / "b.txt").write_text("\n\n".join(texts[40:]))
    pattern, text = str(tmp_path / "deep" / "**" / "*.jsonl"), str(tmp_path / "b.txt")
    data = blend_config([pattern, text, pairs[4]], [1, 2, 3])
    keys = {"splits": ("train",), "vocab_size": vocab, "tokenizer_dir": tmp_path / "tokenizer"}
    check_data(data, **keys, train_samples=600)
    model = replace(LLAMA, vocab_size=vocab)
    train, _ = _train(data, 75, tmp_path, model)
    assert np.bincount(train.order.source).tolist() == [100, 200, 300]


# ---------------------------------------------------------------------------------------- refusals


def _refused(data, message, **keys):
    values = {"splits": ("train",), "vocab_size": 101, **keys}
    with pytest.raises(ValueError, match=message):
        check_data(data, **values)


def test_sources_are_refused_by_name(pairs, tmp_path):
    other = blend_config([pairs[0], str(tmp_path / "none")], [1, 1])
    _refused(other, r"data.blend.1.path=.*none does not exist; set data.blend.1.path to")
    np.save(tmp_path / "ids.npy", np.zeros((4, SEQ), np.int32))
    rows = blend_config([pairs[0], str(tmp_path / "ids.npy")], [1, 1])
    _refused(rows, r"data.blend.1.path=.* is a .npy, which cannot be blended")
    large = blend_config([pairs[0], write_pair(tmp_path / "large", vocab=500)], [1, 1])
    _refused(large, r"data.blend.1.path=.* holds token id \d+ but the model's vocab_size is 101")
    short = blend_config([pairs[0], write_pair(tmp_path / "short", documents=1)], [1, 1])
    _refused(short, r"data.blend.1.path=.*", splits=("train", "validation"))
    _refused(blend_config(pairs), r"data.blend needs data.num_samples", splits=None)


def test_a_source_too_short_for_its_share(pairs):
    data = blend_config(pairs, blend_max_epochs=2)
    says = r"data.blend.0.path=.*s0 holds (\d+) samples of data.seq_length=16, and its share of "
    _refused(
        data,
        says + r"9000 is 900: .* epochs, more than data.blend_max_epochs=2",
        train_samples=9000,
    )
    check_data(data, splits=("train",), vocab_size=101, train_samples=200)
    check_data(blend_config(pairs), splits=("train",), vocab_size=101, train_samples=10**9)


def test_a_pair_of_another_tokenizer(tmp_path):
    texts = make_texts(40)
    save_tokenizer(tmp_path / "tokenizer", texts)
    from nemo_minitron.data.indexed import TextTokenizer

    tokenizer = TextTokenizer(tmp_path / "tokenizer")
    word = next(i for i in range(10, 400) if tokenizer.text(i).isalnum())
    keys = {"vocab_size": 400, "tokenizer_dir": tmp_path / "tokenizer"}
    good = write_pair(tmp_path / "good", last=tokenizer.eod)
    check_data(blend_config([good], [1]), splits=("train",), **keys)
    bad = blend_config([good, write_pair(tmp_path / "bad", last=word)], [1, 1])
    _refused(bad, rf"data.blend.1.path=.* ends every document with id {word}, which is", **keys)

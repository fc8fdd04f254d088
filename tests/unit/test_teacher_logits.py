"""Stored teacher outputs and keys that do not fit are refused before any model is built."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nemo_minitron.checkpoint.artifact import output_folder
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import DistillConfig, TeacherLogitsConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.config.training_stages import TeacherPassConfig
from nemo_minitron.data.blend import BlendedSamples, Order
from nemo_minitron.data.samples import NpyDataset
from nemo_minitron.distillation.logit_index import LogitIndex, Part, check_stored, data_keys
from nemo_minitron.distillation.logit_loss import capped_
from nemo_minitron.distillation.logit_shards import (
    StoredTeacher,
    sample_hash,
    shard_hash,
    stored_targets,
    write_shard,
)
from nemo_minitron.stages import distill, teacher_logits
from tests.helpers.tiny import GEMMA2, LLAMA, token_batch, write_npy, write_result

SAMPLES, LENGTH, STORED_K, PER_SHARD = 6, 16, 8, 4
IDS = token_batch(SAMPLES, LENGTH - 1, LLAMA.vocab_size)


def _data(home: Path, **keys: Any) -> DataConfig:
    values = {"path": str(home / "ids.npy"), "seq_length": LENGTH, "global_batch_size": 2, **keys}
    return DataConfig(**values)


def _write_stored(home: Path, name: str, ids: torch.Tensor, **index: Any) -> Path:
    """Random outputs as a result of ``teacher_logits``."""
    cfg = TeacherLogitsConfig(
        checkpoint=str(home / "teacher"), data=_data(home), output_dir=str(home / name)
    )
    hashes = torch.tensor([sample_hash(row) for row in ids])
    with output_folder(cfg, "teacher_logits") as work:
        folder = work / "logits"
        folder.mkdir()
        for number, rows in enumerate(torch.arange(SAMPLES).split(PER_SHARD)):
            shape = (len(rows), LENGTH, STORED_K)
            tensors = {
                "values": torch.randn(shape).sort(-1, descending=True).values,
                "ids": torch.rand(*shape[:2], LLAMA.vocab_size).topk(STORED_K).indices.int(),
                "log_z": torch.full(shape[:2], 9.0),
                "tokens": hashes[rows],
            }
            write_shard(folder / f"train-0000{number}.safetensors", tensors)
        values: dict[str, Any] = {
            "top_k": STORED_K,
            "vocab_size": LLAMA.vocab_size,
            "seq_length": LENGTH,
            "temperature": 1.0,
            "dtype": "float32",
            "shard_samples": PER_SHARD,
            "data": data_keys(cfg.data),
            "parts": {"train": Part(samples=SAMPLES, tokens=[shard_hash(hashes[:4]), "-"])},
        }
        LogitIndex(**{**values, **index}).save(folder)
    return home / name


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Teacher, student, tokens and stored outputs."""
    folder = tmp_path_factory.mktemp("stored")
    write_result(folder / "teacher", LLAMA, 1)
    write_result(folder / "student", replace(LLAMA, num_layers=2), 2)
    write_npy(folder / "ids.npy", SAMPLES, LENGTH, LLAMA.vocab_size)
    _write_stored(folder, "stored", IDS)
    return folder


def _cfg(home: Path, **changes: Any) -> DistillConfig:
    sections: dict[str, tuple[Any, dict[str, Any]]] = {
        "trainer": (TrainerConfig, {"max_steps": 3, "limit_val_batches": 0}),
        "distillation": (DistillationConfig, {"loss": "top_k_tail", "top_k": STORED_K}),
    }
    values: dict[str, Any] = {
        "student": str(home / "student"),
        "teacher_logits": str(home / "stored"),
        "output_dir": str(home / "out"),
        "data": _data(home, **changes.pop("data", {})),
    }
    for name, (cls, keys) in sections.items():
        values[name] = cls(**{**keys, **changes.pop(name, {})})
    return DistillConfig(**{**values, **changes})


def test_what_fits_is_taken(home):
    distill.check(_cfg(home))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": "t"}, "needs one of teacher= .* and teacher_logits= .*; both is set"),
        ({"teacher_logits": None}, "; neither is set"),
        (
            {"distillation": {"loss": "forward_kl", "top_k": None}},
            "distillation.loss=forward_kl reads .* set distillation.loss to top_k or top_k_tail",
        ),
        ({"distillation": {"offload_teacher": True}}, "offload_teacher=true is for a teacher"),
        (
            {"distillation": {"top_k": STORED_K + 1}},
            "holds 8 logits of each token, fewer than distillation.top_k=9; lower it, or run",
        ),
        (
            {"distillation": {"temperature": 2.0}},
            "holds normalisers at temperature=1.0, .* set distillation.temperature=1.0 or",
        ),
        ({"data": {"seed": 7}}, r"other samples: data.seed=7 \(1234 when they were stored\); set"),
        (
            {"trainer": {"max_steps": 4}},
            "holds 6 training samples, fewer than trainer.max_steps=4 x data.global_batch_size=2;",
        ),
    ],
)
def test_keys_that_do_not_fit(home, changes, says):
    with pytest.raises(ValueError, match=says):
        distill.check(_cfg(home, **changes))


def test_a_temperature_of_its_own_is_free_without_a_tail(home):
    distill.check(_cfg(home, distillation={"loss": "top_k", "temperature": 2.0, "top_k": 3}))


def _mixed(path: Path, weights: list[float], *changes: tuple[int, list[float]]) -> dict[str, Any]:
    """Keys of a blend of two sources, with other weights from steps on."""
    sources = [{"weight": w, "path": f"{path}{n}"} for n, w in enumerate(weights)]
    later = [{"step": step, "weights": other} for step, other in changes]
    return {"path": "", "blend": sources, "blend_changes": later or None}


@pytest.mark.parametrize(
    ("now", "steps", "fits"),
    [
        (([1.0, 3.0], (2, [1.0, 1.0])), 3, True),
        (([2.0, 6.0], (2, [5.0, 5.0])), 3, True),  # the same shares
        (([1.0, 3.0],), 2, True),  # the change is not reached
        (([1.0, 3.0],), 3, False),
        (([1.0, 3.0], (1, [1.0, 1.0])), 3, False),
        (([3.0, 1.0], (2, [1.0, 1.0])), 3, False),
        (None, 3, False),
    ],
)
def test_another_mixture_is_refused_before_training(home, tmp_path, now, steps, fits):
    """The tokens alone would tell in the middle of it, at the first sample that differs."""
    (tmp_path / "logits").mkdir()
    index = LogitIndex.load(home / "stored/logits")
    then = data_keys(_data(home, **_mixed(home / "ids", [1.0, 3.0], (2, [1.0, 1.0]))))
    replace(index, data=then).save(tmp_path / "logits")
    data = {} if now is None else _mixed(home / "ids", *now)
    cfg = _cfg(home, teacher_logits=str(tmp_path), trainer={"max_steps": steps}, data=data)
    if fits:
        check_stored(cfg, LLAMA.vocab_size)
    else:
        with pytest.raises(
            ValueError, match=r"another mixture .* said \[\[0, \[0.25, 0.75\]\], \[4, "
        ):
            check_stored(cfg, LLAMA.vocab_size)
    del then["mixture"]  # an earlier version did not store it: nothing is known
    replace(index, data=then).save(tmp_path / "logits")
    check_stored(cfg, LLAMA.vocab_size)


def test_outputs_that_do_not_fit(home, tmp_path):
    other = _write_stored(home, "narrow", torch.zeros(SAMPLES, LENGTH), vocab_size=99)
    cfg = _cfg(home, teacher_logits=str(other))
    with pytest.raises(ValueError, match=r"vocabulary of 99 but student has vocab_size=101; set "):
        distill.check(cfg)
    cfg = _cfg(home, trainer={"limit_val_batches": 1}, data={"path": str(tmp_path)})
    (tmp_path / "a.txt").write_text("a b c")
    with pytest.raises(ValueError, match=r"no validation samples; set trainer.limit_val_batches=0"):
        check_stored(cfg, LLAMA.vocab_size)


def test_a_truncated_shard(home):
    folder = _write_stored(home, "short", IDS)
    shard = folder / "logits" / "train-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"teacher_logits=.*/train-00001.safetensors is truncated"):
        distill.check(_cfg(home, teacher_logits=str(folder), verify_inputs="size"))
    with pytest.raises(
        ValueError, match=r"train-00001.safetensors is damaged .*; restore the file"
    ):
        _joined(home, folder, SAMPLES)


def _joined(home: Path, folder: Path, samples: int, top_k: int = 3) -> StoredTeacher:
    dataset = NpyDataset(IDS.numpy(), samples)
    return StoredTeacher(dataset, folder / "logits", "train", top_k=top_k, data_path="ids.npy")


def test_samples_bring_their_outputs(home):
    joined = _joined(home, home / "stored", 5)
    assert len(joined) == 5
    batch = {key: torch.stack([joined[i][key] for i in (3, 4)]) for key in joined[0]}
    targets = stored_targets(batch, 1.0)
    assert targets.values.shape == targets.ids.shape == (2 * LENGTH, 3)
    assert targets.ids.dtype == torch.int64
    # Tokens of both samples take turns, as in a flattened [s, b, h].
    assert torch.equal(targets.values[1::2], joined[4]["teacher_values"])
    assert torch.equal(targets.ids[::2], joined[3]["teacher_ids"].long())
    filler = joined[None]
    assert not filler["loss_mask"].any()
    assert torch.isfinite(filler["teacher_values"]).all()


def test_a_filler_of_a_blend_may_be_of_another_source(home):
    """A validation with too few samples asks for fillers, whose tokens no loss counts."""
    first, second = NpyDataset(IDS[1:2].numpy(), 1), NpyDataset(IDS[:1].numpy(), 1)
    order = Order(np.array([1, 0], np.int16), np.zeros(2, np.int64))
    blend = BlendedSamples([first, second], order, ["a", "b"], [1, 1])
    folder = home / "stored" / "logits"
    joined = StoredTeacher(blend, folder, "train", top_k=3, data_path="(data.blend)")
    assert torch.equal(joined[0]["tokens"], IDS[0, :LENGTH])
    assert not joined[None]["loss_mask"].any()
    assert torch.equal(joined[None]["teacher_values"], joined[0]["teacher_values"])


def test_other_tokens_are_refused_at_the_ends_and_inside(home):
    for index, early in ((0, True), (5, True), (2, False)):
        changed = IDS.clone()
        changed[index, 3] += 1
        folder = _write_stored(home, f"other{index}", changed)
        says = f"made from other tokens: train sample {index} of data.path=ids.npy differs; set "
        if early:
            with pytest.raises(ValueError, match=says):
                _joined(home, folder, SAMPLES)
        else:
            joined = _joined(home, folder, SAMPLES)
            with pytest.raises(ValueError, match=says):
                joined[index]


def test_more_samples_than_are_stored(home):
    with pytest.raises(ValueError, match="holds 6 train samples, fewer than the 7 of this run"):
        _joined(home, home / "stored", SAMPLES + 1)


def test_a_shard_of_another_shape(home):
    folder = _write_stored(home, "odd", IDS, top_k=STORED_K + 1)
    with pytest.raises(ValueError, match=r"is not the shard that .*index.json describes; run"):
        _joined(home, folder, SAMPLES)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"top_k": 102}, "top_k=102 is larger than the vocabulary of 101; set top_k to 101 or"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"dtype": "int8"}, "dtype=int8 must be float32 or bfloat16"),
        ({"shard_samples": 3}, "shard_samples=3 must be a multiple of data.micro_batch_size=2;"),
        (
            {"parallel": ParallelConfig(context_parallel_size=3)},
            "data.seq_length=16 must be a multiple of 6",
        ),
        ({"checkpoint": "nowhere"}, "checkpoint=nowhere does not exist"),
    ],
)
def test_what_teacher_logits_refuses(home, changes, says):
    values = {
        "checkpoint": str(home / "teacher"),
        "output_dir": str(home / "out"),
        "data": _data(home, micro_batch_size=2),
        "trainer": TeacherPassConfig(limit_val_batches=0),
    }
    with pytest.raises(ValueError, match=says):
        teacher_logits.check(TeacherLogitsConfig(**{**values, **changes}))


def test_rounded_soft_caps_are_said(home, tmp_path, caplog):
    """Behind the cap a logit of a bf16 teacher has more than 8 bits."""
    write_result(tmp_path / "capped", GEMMA2, 1)
    for folder, dtype, said in (
        (tmp_path / "capped", "bfloat16", True),
        (tmp_path / "capped", "float32", False),
        (home / "teacher", "bfloat16", False),
    ):
        caplog.clear()
        passes = TeacherPassConfig(limit_val_batches=0, max_steps=1)
        cfg = TeacherLogitsConfig(
            checkpoint=str(folder),
            output_dir=str(tmp_path / "out"),
            dtype=dtype,
            data=_data(home),
            trainer=passes,
        )
        teacher_logits.check(cfg)
        assert ("behind final_logit_softcapping=3, by up to 1/256" in caplog.text) == said
    logits = capped_(torch.linspace(-40, 40, 1001).bfloat16().float(), 30.0)
    error = (logits.bfloat16().float() - logits).abs() / logits.abs().clamp_min(1e-9)
    assert 1 / 512 < error.max() <= 1 / 256

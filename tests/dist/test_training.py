"""Logs, checkpoints and weight decay of a training run."""

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemo_minitron.checkpoint.seals import read_seal
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import TrainerConfig
from nemo_minitron.models import history as history_module
from nemo_minitron.models.phases import Course
from nemo_minitron.models.saving import of_own_storage
from nemo_minitron.models.speed import Speed
from nemo_minitron.models.stragglers import Stragglers
from tests.cases.training import (
    GLOBAL_BATCH,
    SEQ,
    STEPS,
    decayed,
    found_where_one_rank_sees_less,
    left_in_memory,
    log_files,
    train,
)
from tests.helpers.tiny import LLAMA, write_weights

STUDENT = replace(LLAMA, num_layers=2, hidden_size=48, ffn_hidden_size=64)
TEACHER = replace(LLAMA, num_layers=2)
TOKENS = GLOBAL_BATCH * (SEQ - 1)


@pytest.fixture(scope="module")
def run(ranks, tmp_path_factory):
    """``run(**over)`` -> history and working folder of a single-rank run, new or gone on with."""
    folder = tmp_path_factory.mktemp("training")
    write_weights(folder / "student", STUDENT, 1)
    write_weights(folder / "teacher", TEACHER, 2)
    pair = [(STUDENT, str(folder / "student")), (TEACHER, str(folder / "teacher"))]

    def run(task=train, work=None, size=1, parallel=None, **over):
        work = work or folder / f"run{len(list(folder.iterdir()))}"
        found = ranks.run(size, task, *pair, parallel or ParallelConfig(), str(work), over)[0]
        return (found[0], work) if task is train else found

    return run


def _losses(history):
    return torch.tensor([record["loss"] for record in history if "loss" in record])


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a training checkpoint with torch."""
    reader = FileSystemReader(folder)
    known = reader.read_metadata().state_dict_metadata
    found = {
        name: torch.empty(one.size, dtype=one.properties.dtype)
        for name, one in known.items()
        if isinstance(one, TensorStorageMetadata)
    }
    torch.distributed.checkpoint.load(found, storage_reader=reader, no_dist=True)
    return found


@pytest.fixture(scope="module")
def every_step(run):
    """A run that logs all there is at every step, in Weights & Biases too; it may take hours."""
    kwargs = {"project": "minitron", "name": "test", "offline": True}
    loggers = {"create_wandb_logger": True, "wandb_logger_kwargs": kwargs}
    trainer = {"log_memory": True, "hang_after_minutes": 100}
    return run(ce_weight=0.5, exp_manager=loggers, flops=[6e9], trainer=trainer)


def test_history_and_loggers(every_step):
    """KD and LM loss of training and validation; TensorBoard and W&B get what the history has."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history, work = every_step
    assert [record["step"] for record in history] == list(range(1, STEPS + 1))
    for record in history:
        assert record["loss"] == pytest.approx(record["kd_loss"] + 0.5 * record["lm_loss"])
        assert record["tokens"] == TOKENS
        steps_per_second = record["tokens_per_second"] / TOKENS
        assert record["tflops_per_gpu"] == pytest.approx(steps_per_second * 6e9 / 1e12)
        assert 0.1 < record["peak_memory_gib"] < 100
        assert "mfu" not in record  # the peak of a CPU is not known
    assert [r["step"] for r in history if {"val_loss", "val_kd_loss"} <= set(r)] == [3, 6]
    events = EventAccumulator(str(work / "logs"))
    events.Reload()
    names = set(events.Tags()["scalars"])
    shown = ("loss", "kd_loss", "lm_loss", "lr", "grad_norm", "tokens_per_second")
    speed = ("tflops_per_gpu", "peak_memory_gib")
    assert {f"train/{name}" for name in (*shown, *speed)} | {"val_loss", "val_kd_loss"} <= names
    logged = [event.value for event in events.Scalars("train/kd_loss")]
    assert logged == pytest.approx([record["kd_loss"] for record in history])
    assert list(Path(work / "logs/wandb").glob("offline-run-*/*.wandb"))


def test_steps_between_logs(run, every_step):
    """Tokens add up over the steps that are not logged, and the logged losses are the same."""
    history, _ = run(ce_weight=0.5, trainer={"log_every_n_steps": 4, "limit_val_batches": 0})
    assert [record["step"] for record in history] == [4, 6]
    assert [record["tokens"] for record in history] == [4 * TOKENS, 2 * TOKENS]
    assert torch.equal(_losses(history), _losses(every_step[0])[[3, 5]])


def test_the_speed_of_a_resumed_run_counts_its_own_tokens(monkeypatch, tmp_path):
    """Not those that the run before read since it logged, in time that nobody knows."""
    speed, course = Speed(1, None, memory=False), Course([], [])
    monkeypatch.setattr(course.__class__, "epochs", lambda *_: {})
    now = iter([100.0, 102.0, 103.0])
    monkeypatch.setattr(history_module.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(history_module, "progress", lambda *_: nullcontext(lambda *_, **__: None))
    monkeypatch.setattr(history_module.History, "_note", lambda *_: None)
    kept = history_module.History(tmp_path, 9, speed, course, Stragglers(0.0))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace())
    trainer: Any = SimpleNamespace(global_step=5, fit_loop=loop)
    model: Any = SimpleNamespace(unlogged=torch.tensor(500.0), log=lambda *_, **__: None)
    model.trainer_cfg = None
    kept.on_train_start(trainer, model)
    for step, tokens in ((8, 800.0), (9, 100.0)):
        trainer.global_step, model.last_metrics = step, {"loss": 1.0, "tokens": tokens}
        kept.on_train_batch_end(trainer, model)
    assert [r["tokens_per_second"] for r in kept.records] == [150.0, 100.0]
    assert [r["tokens"] for r in kept.records] == [800.0, 100.0]


def test_a_note_that_cannot_be_written_does_not_end_a_training(monkeypatch, tmp_path):
    """It is for ``minitron status`` alone; here a file stands where its folder should be."""
    work = tmp_path / "work"
    work.write_text("")
    monkeypatch.setattr(history_module.dist, "get_rank", lambda: 0)
    kept = history_module.History(
        work, 9, Speed(1, None, memory=False), Course([], []), Stragglers(0.0)
    )
    kept.records = [{"step": 2, "loss": 1.0, "tokens_per_second": 5.0}]
    kept._note(2, TrainerConfig())


def test_batch_sizes(run, every_step):
    """The micro-batch size does not change what is learnt; the global batch is the step."""
    for micro in (2, 4):
        history, _ = run(ce_weight=0.5, data={"micro_batch_size": micro})
        torch.testing.assert_close(_losses(history), _losses(every_step[0]), rtol=0, atol=1e-5)
    data = {"global_batch_size": 8, "micro_batch_size": 4}
    history, _ = run(trainer={"max_steps": 3, "limit_val_batches": 0}, data=data)
    assert [record["tokens"] for record in history] == [2 * TOKENS] * 3


def test_ranks_agree_on_checkpoints_that_not_all_see(ranks, tmp_path):
    """Else some would go on from another step, or write a checkpoint alone, and wait for ever."""
    (tmp_path / "step=3").mkdir()
    found = ranks.run(2, found_where_one_rank_sees_less, str(tmp_path))
    assert found == [(str(tmp_path / "step=3"), 0)] * 2


def test_newest_checkpoints_are_kept(run):
    _, work = run(trainer={"save_top_k": 2, "save_every_n_steps": 1, "limit_val_batches": 0})
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["step=5", "step=6"]


def test_fewer_checkpoints_are_kept_after_a_resume(run):
    """Those that were kept before go, and so do later ones in their turn.

    Lightning leaves the one that a run went on from; the next start would remove it.
    """
    keys = {"save_every_n_steps": 1, "limit_val_batches": 0}
    _, work = run(trainer={**keys, "save_top_k": 3, "max_steps": 3})
    folder = work / "checkpoints"
    assert len(list(folder.iterdir())) == 3
    run(work=work, trainer={**keys, "save_top_k": 2})
    assert sorted(path.name for path in folder.iterdir()) == ["step=3", "step=5", "step=6"]


def test_checkpoints_beside_training(run, every_step):
    """They are what training itself writes: a run goes on from them with the same losses."""
    over = {"limit_val_batches": 0, "async_save": True}
    history, work = run(trainer={**over, "save_top_k": 2, "keep_every_n_steps": 3})
    assert torch.equal(_losses(history), _losses(run(trainer={"limit_val_batches": 0})[0]))
    folder = work / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step=3", "step=5", "step=6"]
    shutil.rmtree(folder / "step=6")
    shutil.rmtree(folder / "step=5")
    again, _ = run(work=work, trainer=over)
    assert torch.equal(_losses(again), _losses(history))


@pytest.mark.parametrize("tp", [1, 2])
def test_every_checkpoint_beside_training_is_that_of_its_step(run, tp):
    """Though training goes on meanwhile, and later ones take over the plans of earlier ones."""
    parallel = ParallelConfig(tensor_model_parallel_size=tp)
    works = [
        run(size=2, parallel=parallel, trainer={"limit_val_batches": 0, "async_save": beside})[1]
        for beside in (False, True)
    ]
    last: dict[str, torch.Tensor] = {}
    for step in range(1, STEPS + 1):
        folders = [work / "checkpoints" / f"step={step}" for work in works]
        assert read_seal(folders[0]).keys() == read_seal(folders[1]).keys()
        want, got = map(_tensors, folders)
        assert want.keys() == got.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
        assert not last or not all(torch.equal(got[name], last[name]) for name in last)
        last = got


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_memory_is_not_copied(dtype):
    """A part of a larger buffer becomes a tensor of its own, of the same bytes."""
    buffer = torch.arange(60).to(dtype)
    for part in (buffer[7:31].view(4, 6), buffer[3]):
        alone = of_own_storage(part)
        assert torch.equal(alone, part)
        assert alone.untyped_storage().size() == part.numel() * part.element_size()
        assert alone.data_ptr() == part.data_ptr()
    for other in (buffer.view(6, 10).t(), buffer[:0]):
        assert of_own_storage(other) is other


def test_checkpoints_by_time(run):
    """Every three thousandths of a second is after every step."""
    trainer = {"save_every_n_steps": 0, "save_every_n_minutes": 5e-5, "limit_val_batches": 0}
    _, work = run(trainer={**trainer, "save_top_k": 1})
    assert [path.name for path in (work / "checkpoints").iterdir()] == [f"step={STEPS}"]


def test_checkpoints_by_time_and_by_steps(run):
    """The clock, due at every step, takes away none that was written by steps."""
    trainer = {"save_every_n_steps": 2, "save_every_n_minutes": 5e-5, "limit_val_batches": 0}
    _, work = run(trainer={**trainer, "save_top_k": 1, "max_steps": 5})
    assert sorted(path.name for path in (work / "checkpoints").iterdir()) == ["step=4", "step=5"]


@pytest.mark.parametrize("key", ["exit_interval", "exit_duration_in_mins"])
def test_a_run_ends_itself(run, every_step, key):
    """By step or by the clock; what goes on from there has the losses of a whole run."""
    trainer = {"limit_val_batches": 0, "save_every_n_steps": 0}
    work = every_step[1].with_name(key)
    value = 2 if key == "exit_interval" else 1e-6
    with pytest.raises(RuntimeError, match=f"Preempted: trainer.{key}={value:g}.*; saved at step"):
        run(work=work, trainer={**trainer, key: value})
    history, _ = run(work=work, trainer=trainer)
    want, _ = run(trainer=trainer)
    assert torch.equal(_losses(history), _losses(want))


def test_what_weight_decay_leaves_out(ranks):
    """Norms and biases; the embedding and the output layer are decayed, as in Megatron."""
    config = replace(STUDENT, add_qkv_bias=True, qk_layernorm=False)
    ((with_decay, without),) = ranks.run(1, decayed, config, ParallelConfig())
    assert without
    for name in without:
        assert "norm" in name or name.endswith("bias"), name
    assert {"embedding.word_embeddings.weight", "output_layer.weight"} <= set(with_decay)
    assert not [name for name in with_decay if "norm" in name or name.endswith("bias")]


@pytest.mark.parametrize("distributed_optimizer", [True, False])
def test_nothing_stays_in_memory(run, distributed_optimizer):
    """A search trains many candidates in one process."""
    over = {"optim": {"use_distributed_optimizer": distributed_optimizer}}
    assert run(left_in_memory, **over) == []


def test_log_files_are_closed(run):
    """Or the next training of the process would write there, or fail where the folder has gone."""
    written, still_open = run(log_files)
    assert {"lightning_logs.txt", "nemo_error_log.txt"} <= set(written)
    assert still_open == []

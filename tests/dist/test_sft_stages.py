"""Stages that run a model on SFT records, as a user starts them, at one rank and at four."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_minitron.config.distillation import DistillationConfig, IntermediateConfig
from nemo_minitron.config.parallel import TeacherParallelConfig
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.config.training import DataConfig, TrainerConfig
from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.stages import distill
from tests.helpers.bad_input import done, line, run_line
from tests.helpers.sft_fixtures import chat_tokenizer, conversations, write_records
from tests.helpers.tiny import LLAMA

DATA = {
    "data.path": "{home}/chat.jsonl",
    "data.seq_length": 128,
    "data.split": "80,20,0",
    "data.global_batch_size": 4,
}
TRAINER = {
    "trainer.max_steps": 3,
    "trainer.val_check_interval": 3,
    "trainer.limit_val_batches": 1,
    "trainer.save_every_n_steps": 0,
}
TEXTS = [{"text": f"d{n}w1 " * 60} for n in range(20)]
TP2_CP2 = {"parallel.tensor_model_parallel_size": 2, "parallel.context_parallel_size": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """``model`` (imported, with a chat template), ``scores`` and ``student`` (pruned by them)."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("sft")
    vocab = chat_tokenizer(folder / "hf")
    torch.manual_seed(0)
    config = LlamaConfig(**FAMILY.to_hf(replace(LLAMA, num_layers=2, vocab_size=vocab)))
    LlamaForCausalLM(config).save_pretrained(folder / "hf")
    write_records(folder / "chat.jsonl", conversations(60))
    done(run_line(line("import", folder, folder / "model")))
    return folder


def _run(ranks, size, stage, home, out, **keys):
    for ending in ranks.run(size, run_line, line(stage, home, out, **{**DATA, **keys})):
        done(ending)
    return json.loads((out / "metrics.json").read_text())


def test_importance(ranks, home, tmp_path):
    """Samples are full: as many tokens as positions, at every layout the same scores."""
    outs = [(1, {}, home / "scores"), (4, TP2_CP2, tmp_path / "four")]
    keys = {"data.num_samples": 6, "scores.axes": "[hidden,ffn,head,layer]"}
    for size, layout, out in outs:
        metrics = _run(ranks, size, "importance", home, out, **keys, **layout)
        assert metrics["num_tokens"] == 6 * 128
    one, four = (Scores.load(out) for *_, out in outs)
    for axis, tensor in one.items():
        torch.testing.assert_close(four[axis], tensor, rtol=1e-5, atol=1e-7)


def test_training(ranks, home, tmp_path):
    """Distillation and fine-tuning give the same losses at every layout, and so does evaluation."""
    done(
        run_line(
            line(
                "prune",
                home,
                home / "student",
                importance=None,
                **{"pruning.target.ffn_hidden_size": None, "pruning.drop_layers": "[1]"},
            )
        )
    )
    for stage in ("distill", "finetune"):
        one = _run(ranks, 1, stage, home, tmp_path / f"{stage}1", **TRAINER)
        four = _run(ranks, 4, stage, home, tmp_path / f"{stage}4", **TRAINER, **TP2_CP2)
        losses = [[r["loss"] for r in run["history"] if "loss" in r] for run in (one, four)]
        assert len(losses[0]) == 3
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
        assert four["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
        assert four["train_tokens"] == one["train_tokens"]
    write_records(home / "text.jsonl", TEXTS)
    blend = {"data.path": None, "data.blend": "[0.5,{home}/chat.jsonl,0.5,{home}/text.jsonl]"}
    one = _run(ranks, 1, "finetune", home, tmp_path / "mixed1", **TRAINER, **blend)
    four = _run(ranks, 4, "finetune", home, tmp_path / "mixed4", **TRAINER, **blend, **TP2_CP2)
    assert four["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)
    assert four["train_tokens"] == one["train_tokens"] > 0
    keys = {"data.num_samples": None, "data.split_name": "validation"}
    packed = _run(ranks, 1, "evaluate", home, tmp_path / "packed", **keys)
    alone = _run(ranks, 1, "evaluate", home, tmp_path / "alone", **keys, **{"data.pack": "false"})
    assert packed["tokens"] == alone["tokens"]
    assert packed["lm_loss"] == pytest.approx(alone["lm_loss"], rel=1e-6)
    assert packed["samples"] < alone["samples"]


def test_borders_of_records_are_not_sent_to_a_teacher(home, tmp_path):
    """Whether the keys say that there are records or the file does, of one source or of several."""
    chat, text = str(home / "chat.jsonl"), write_records(tmp_path / "text.jsonl", TEXTS)

    def check(own_ranks: int = 2, **data: Any) -> None:
        sections = {"seq_length": 128, "split": "1", "global_batch_size": 4, **data}
        cfg = DistillConfig(
            student=str(home / "model"),
            teacher=str(home / "model"),
            output_dir=str(tmp_path / "out"),
            data=DataConfig(**sections),
            trainer=TrainerConfig(max_steps=1, limit_val_batches=0),
            teacher_parallel=TeacherParallelConfig(own_ranks=own_ranks),
        )
        distill.check(cfg)

    blend = {"path": None, "blend": [0.5, str(text), 0.5, chat]}
    for data in ({"path": chat}, {"path": chat, "records": "sft"}, blend):
        with pytest.raises(ValueError, match=r"data.pack=true .*own_ranks=2; set data.pack=false"):
            check(**data)
        check(own_ranks=0, **data)
    check(path=chat, pack=False)
    check(path=str(text))


def test_relations_of_records_that_share_a_sample(home, tmp_path):
    """The loss would compare positions of one record with those of the next."""

    def check(**data: Any) -> None:
        losses = IntermediateConfig(losses=["attention_relation"], layer_map=[[1, 1]])
        cfg = DistillConfig(
            student=str(home / "model"),
            teacher=str(home / "model"),
            output_dir=str(tmp_path / "out"),
            data=DataConfig(seq_length=128, split="1", global_batch_size=4, **data),
            trainer=TrainerConfig(max_steps=1, limit_val_batches=0),
            distillation=DistillationConfig(intermediate=losses),
        )
        distill.check(cfg)

    with pytest.raises(ValueError, match=r"attention_relation.*set data.pack=false"):
        check(path=str(home / "chat.jsonl"))
    check(path=str(home / "chat.jsonl"), pack=False)

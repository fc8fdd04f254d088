"""Stages that run a model on SFT records, as a user starts them, at one rank and at four."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.families.llama import LLAMA as FAMILY
from nemo_minitron.pruning.scores import Scores
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
    texts = [{"text": f"d{n}w1 " * 60} for n in range(20)]
    write_records(home / "text.jsonl", texts)
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

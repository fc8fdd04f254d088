"""The whole road through the shipped quickstart experiment, with a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from tests.helpers.data_fixtures import EOS, make_texts, save_tokenizer

STAGES = (
    "teacher",
    "evaluate_teacher",
    "importance",
    "pruned",
    "evaluate_pruned",
    "distilled",
    "evaluate_distilled",
    "exported",
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A random Llama with a tokenizer, and a folder of speeches."""
    folder = tmp_path_factory.mktemp("road")
    texts = make_texts(60, words=120)
    vocab = save_tokenizer(folder / "model", texts)
    (folder / "model" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS})
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: llama3.1\n---\n# A model\n")
    (folder / "text").mkdir()
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:03}.txt").write_text(text)
    return folder


def _pipeline(inputs: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [
        *(sys.executable, "-m", "nemo_minitron", "pipeline", "experiment=quickstart"),
        f"inputs.model={inputs}/model",
        f"inputs.text={inputs}/text",
        f"output_dir={inputs}/run",
        "inputs.seq_length=16",
        "inputs.ffn_hidden_size=64",
        "inputs.steps=4",
        *more,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)


def check_card(card: str) -> None:
    """Check that the model card names every stage of the pipeline."""
    for text in (
        "\nlicense: llama3.1\n",
        "\n- pruning\n- distillation\n",
        "from `model` (Hugging Face)",
        "| `ffn_hidden_size` | 96 | 64 | 66.7% |",
        "`pruning.target.ffn_hidden_size=64`",
        "`distill`, teacher `teacher` (",
        "`distillation.loss=forward_kl`",
        "`trainer.max_steps=4`",
        "| distill | `text` | ",
        "| hidden, ffn, head, layer | mean | l2 | `text` (train) | ",
        "The source says `license: llama3.1`",
    ):
        assert text in card, text


@pytest.mark.timeout(600)
def test_quickstart_then_again(inputs):
    """Every stage leaves a complete result; a second run does nothing."""
    first = _pipeline(inputs)
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    for name in STAGES:
        assert json.loads((inputs / "run" / name / "manifest.json").read_text())["complete"]
    assert (inputs / "run" / "report.html").stat().st_size > 10_000
    for label in ("teacher", "pruned", "distilled"):
        assert label in first.stdout
    model = AutoModelForCausalLM.from_pretrained(inputs / "run" / "exported")
    tokenizer = AutoTokenizer.from_pretrained(inputs / "run" / "exported")
    assert model.config.intermediate_size == 64
    ids = tokenizer("the people", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 5
    check_card((inputs / "run" / "exported" / "README.md").read_text())
    stamps = {name: (inputs / "run" / name / "manifest.json").stat().st_mtime_ns for name in STAGES}
    again = _pipeline(inputs)
    assert again.returncode == 0, again.stderr[-3000:]
    for name, stamp in stamps.items():
        assert (inputs / "run" / name / "manifest.json").stat().st_mtime_ns == stamp, name

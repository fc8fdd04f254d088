"""The quick start with thirty times its tokens: distillation against language-model training.

The same stages as ``benchmarks/kd_vs_ce.py``, each a ``minitron`` command; what is there from an
earlier run is not run again. In the small run a random model learns made-up text for two steps.
"""

import json
import statistics
from argparse import Namespace
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import kd_vs_ce
from benchmarks.gpu.common import GGUF, SPEECHES, Options, Result
from benchmarks.stage_graph import run_graph
from tests.helpers.data_fixtures import EOS, make_texts, save_tokenizer

QUICK_STEPS, TIMES, TOKENS_PER_STEP = 25, 30, 4 * 256
_PRECISION = "trainer.precision=bf16-mixed"
_KEEP_AT = 4096  # more steps than there are: nothing is saved on the way


def _arms(precision: str) -> list[str]:
    keys = f"optim.lr=5e-4 {precision}".strip()
    return [f"KD: distill {keys}", f"CE: finetune {keys}"]


def _write_small(folder: Path) -> None:
    """A random model with a tokenizer, and text."""
    texts = make_texts(60, words=120)
    vocab = save_tokenizer(folder / "model", texts)
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOS}
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(said))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text").mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / "text" / f"{number:03}.txt").write_text(text)


def _arguments(options: Options) -> Namespace:
    """Of ``benchmarks.kd_vs_ce``.

    Raises:
        ValueError: the real model or text is missing.
    """
    folder = options.work / "quickstart"
    line = ["--folder", str(folder / "run"), "--save-every", str(_KEEP_AT)]
    if options.small:
        if not (folder / "text").exists():
            _write_small(folder)
        line += ["--model", str(folder / "model"), "--text", str(folder / "text")]
        line += ["--target", "ffn_hidden_size=64", "--seeds", "1", "--steps", "2"]
        line += ["--seq-length", "16", "--samples", "4", "--eval-samples", "4"]
        return kd_vs_ce.parse([*line, "--val-samples", "4", "--processes", "1"])
    weights, text = options.asset(GGUF), options.asset(SPEECHES)
    if weights is None or text is None:
        raise ValueError(
            f"the quick start's model and text are not in --assets {options.assets}; fetch them "
            "with python scripts/quickstart_assets.py, or bring them with scripts/carry.py"
        )
    line += ["--model", str(weights), "--text", str(text), "--steps", str(QUICK_STEPS * TIMES)]
    return kd_vs_ce.parse([*line, "--processes", "3"])


def run(options: Options) -> Result:
    """Every stage that is missing, then the table."""
    args = _arguments(options)
    arms = [kd_vs_ce.Arm.parse(text) for text in _arms(_PRECISION if not options.small else "")]
    seeds = [1234 + number for number in range(args.seeds)]
    root = args.folder.resolve()
    seconds = run_graph(kd_vs_ce.all_jobs(args, arms, seeds), root, args.processes)
    losses, curves = kd_vs_ce.read_all(root, arms, seeds)
    gains = [ce - kd for kd, ce in zip(losses["KD"], losses["CE"], strict=True)]
    header = ["model", *(f"seed {s}" for s in seeds), "mean ± sd", "minus CE, paired"]
    rows = kd_vs_ce.loss_rows(losses, "CE")
    means = {name: statistics.mean(values) for name, values in losses.items()}
    figures = {"losses": losses, "curves": curves, "gains": gains, "seconds": seconds}
    tokens = args.steps * TOKENS_PER_STEP
    model = "A random model on made-up text" if options.small else "SmolLM2-135M, ffn 1536 to 1024"
    text = (
        f"Held-out LM loss. {model}; {args.steps} steps"
        + ("." if options.small else f" of 1,024 tokens ({tokens:,} in all), bf16, lr 5e-4.")
        + " KD and CE start from the same pruned weights and read the same samples per seed."
    )
    checks = {"training on text lowers the pruned model's loss": means["CE"] < means["pruned"]}
    if not options.small:  # a random teacher has nothing to teach
        checks["distillation lowers it too"] = means["KD"] < means["pruned"]
    return Result("Quick start with 30 times the tokens", text, header, rows, checks, figures)

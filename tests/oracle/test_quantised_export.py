"""A pruned model goes on to ModelOpt's post-training quantisation, in its own environment."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nemo_minitron.families.llama import LLAMA as FAMILY
from tests.helpers.bad_input import done, line, run_line
from tests.helpers.sft_fixtures import chat_tokenizer
from tests.helpers.tiny import LLAMA
from tests.oracle.environment import OracleUnavailableError, oracle_python

SCRIPT = Path(__file__).parents[2] / "examples" / "modelopt" / "quantise.py"
FP8_ERROR = 2**-4  # half the distance of two neighbours, for 3 bits of mantissa


@pytest.mark.timeout(600)
def test_fp8(tmp_path):
    """Every matrix of the layers is FP8 with a scale, and is the pruned one within its rounding."""
    try:
        python = oracle_python()
    except OracleUnavailableError as error:
        pytest.skip(str(error))
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab = chat_tokenizer(tmp_path / "hf")
    torch.manual_seed(0)
    config = LlamaConfig(**FAMILY.to_hf(replace(LLAMA, vocab_size=vocab)))
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    done(run_line(line("import", tmp_path, tmp_path / "model")))
    drop = {"pruning.target.ffn_hidden_size": None, "pruning.drop_layers": "[1]"}
    done(run_line(line("prune", tmp_path, tmp_path / "pruned", importance=None, **drop)))
    keys = {"checkpoint": tmp_path / "pruned"}
    done(run_line(line("export", tmp_path, tmp_path / "exported", **keys)))
    (tmp_path / "text.txt").write_text("d1w1 d2w1 d3w1\nd4w1 d5w1\n")
    command = [python, SCRIPT, *(tmp_path / name for name in ("exported", "text.txt", "fp8"))]
    made = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert made.returncode == 0, made.stderr
    found, want = (load_file(tmp_path / name / "model.safetensors") for name in ("fp8", "exported"))
    matrices = [name for name in want if ".layers." in name and name.endswith("proj.weight")]
    assert len(matrices) == 7 * (LLAMA.num_layers - 1)
    for name in matrices:
        assert found[name].dtype == torch.float8_e4m3fn
        weight = found[name].float() * found[f"{name}_scale"]
        torch.testing.assert_close(weight, want[name].float(), rtol=FP8_ERROR, atol=1e-3)
    written = json.loads((tmp_path / "fp8" / "hf_quant_config.json").read_text())
    assert written["quantization"]["quant_algo"] == "FP8"

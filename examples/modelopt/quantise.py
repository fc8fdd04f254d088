"""FP8 weights and activations for an exported model: ModelOpt's post-training quantisation.

    python examples/modelopt/quantise.py EXPORTED TEXT QUANTISED

EXPORTED is what ``minitron export`` wrote, TEXT a file whose lines set the ranges of activations.
It runs where ModelOpt is installed (``pip install nvidia-modelopt``), best in an environment of its
own, and needs no GPU for FP8. QUANTISED opens in vLLM, TensorRT-LLM and SGLang.
"""

import sys
from itertools import islice
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

LINES, LENGTH = 128, 512


def main(exported: str, text: str, quantised: str) -> None:
    """Calibrate, quantise, and write a Hugging Face folder."""
    tokenizer = AutoTokenizer.from_pretrained(exported)
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto").eval()
    with Path(text).open(encoding="utf-8") as file:
        lines = [line for line in islice(file, LINES) if line.strip()]

    def calibrate(model: PreTrainedModel) -> None:
        for line in lines:
            ids = tokenizer(line, return_tensors="pt", truncation=True, max_length=LENGTH).input_ids
            with torch.no_grad():
                model(ids)

    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, calibrate)
    export_hf_checkpoint(model, export_dir=quantised)
    tokenizer.save_pretrained(quantised)


if __name__ == "__main__":
    main(*sys.argv[1:])

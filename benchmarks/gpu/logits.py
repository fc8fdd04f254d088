"""Imported models give the logits of transformers, in fp32 and bf16, by the local layer spec.

What is not exact in bf16 is rounding, so there the yardstick is transformers itself: how far its
bf16 logits are from its own fp32 ones.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.common import GGUF, Options, Result, relative
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportConfig
from nemo_minitron.runtime.launch import device, distributed
from tests.dist.test_families import CASES, write_random

# Every kind of norm, activation, bias, position and MLP that the families have.
TINY = ("llama", "qwen3", "gpt2", "nemotron", "mixtral")
FP32_LIMIT = 1e-4
BF16_LIMIT = 1.5
HEADER = [
    "model",
    "fp32: ours to transformers",
    "fp32: ours to transformers on the CPU",
    "bf16: ours to fp32",
    "bf16: transformers to fp32",
]


def _sources(options: Options) -> dict[str, tuple[Path, dict[str, str]]]:
    """Name -> what to import, and how transformers is told to open it."""
    sources: dict[str, tuple[Path, dict[str, str]]] = {}
    for name in TINY:
        folder = options.work / "logits" / name
        write_random(CASES[name], folder)
        sources[f"{name}, tiny"] = folder, {}
    weights = options.asset(GGUF)
    if weights is not None:
        sources["SmolLM2-135M"] = weights, {"gguf_file": weights.name}
    elif not options.small:
        folder = options.work / "logits" / "smollm2_shape"
        _write_smollm2_shape(folder)
        sources["SmolLM2-135M's shape, random"] = folder, {}
    return sources


def _write_smollm2_shape(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@torch.no_grad()
def _theirs(source: Path, how: dict[str, str], ids: Tensor, dtype: torch.dtype, at: Any) -> Tensor:
    folder = source.parent if how else source
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **how).to(at).eval()
    return model(ids.to(at)).logits.float().cpu()


@torch.no_grad()
def _ours(checkpoint: Path, ids: Tensor, dtype: torch.dtype) -> Tensor:
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups

    groups = ParallelGroups.current()
    (chunk,) = load_frozen(checkpoint, ParallelConfig(), groups, dtype=dtype)
    chunk.return_hidden = False
    positions = torch.arange(ids.size(1), device=device()).expand(ids.shape)
    return chunk(ids.to(device()), positions, None).float().cpu()


def _compare(name: str, source: Path, how: dict[str, str], options: Options) -> dict[str, Any]:
    """Relative errors of one model."""
    from nemo_minitron.stages import import_

    place = options.work / "logits" / f"{name.split(',')[0]}.result"
    import_.run(ImportConfig(source=str(source), output_dir=str(place), overwrite=True))
    config = ModelConfig.load(place / "checkpoint")
    length = 32 if options.small or "tiny" in name else 512
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (2, length), generator=generator)
    ours = _ours(place / "checkpoint", ids, torch.float32)
    on_cpu = _theirs(source, how, ids, torch.float32, "cpu")
    found: dict[str, Any] = {"fp32_to_cpu": relative(ours, on_cpu)}
    # In half precision a token near the border of two experts can go to the other one: no rounding.
    if config.num_moe_experts is None:
        there = _theirs(source, how, ids, torch.float32, device())
        found["fp32_same_device"] = relative(ours, there)
        found["bf16_ours"] = relative(_ours(place / "checkpoint", ids, torch.bfloat16), on_cpu)
        theirs = _theirs(source, how, ids, torch.bfloat16, device())
        found["bf16_theirs"] = relative(theirs, on_cpu)
    return found


def run(options: Options) -> Result:
    """Every model."""
    with distributed(ParallelConfig()):
        figures = {
            name: _compare(name, source, how, options)
            for name, (source, how) in _sources(options).items()
        }
    keys = ("fp32_same_device", "fp32_to_cpu", "bf16_ours", "bf16_theirs")
    rows = [
        [name, *(f"{found[key]:.1e}" if key in found else "" for key in keys)]
        for name, found in figures.items()
    ]
    fp32 = [found[key] for found in figures.values() for key in keys[:2] if key in found]
    bf16 = [f["bf16_ours"] / f["bf16_theirs"] for f in figures.values() if "bf16_ours" in f]
    checks = {
        f"fp32 logits within {FP32_LIMIT:.0e} of transformers": max(fp32) <= FP32_LIMIT,
        f"bf16 logits at most {BF16_LIMIT} times as far off as those of transformers": max(bf16)
        <= BF16_LIMIT,
    }
    text = (
        "Imported from Hugging Face folders, built by the local layer spec; relative error of the "
        "logits (norm of the difference over norm), TF32 off."
    )
    return Result("Logits", text, HEADER, rows, checks, figures)

"""Import is exact, and what is exported after pruning is the model Megatron runs.

Megatron's logits equal transformers' within 1e-4 in fp32.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import (
    ExportConfig,
    ImportConfig,
    PruneConfig,
    PruningConfig,
    TargetConfig,
)
from nemo_minitron.stages import export, import_, prune
from tests.cases.logits import megatron_logits

BASE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "gqa_untied": {},
    "gqa_tied": {"tie_word_embeddings": True},
    "mha": {"num_key_value_heads": 4, "head_dim": 12},
    "mqa_wide_heads": {"num_key_value_heads": 1, "head_dim": 20},
    "llama3_rope": {"rope_parameters": LLAMA3},
}


def _hf(folder: Path, **overrides) -> tuple[Path, torch.Tensor, torch.Tensor]:
    """A random Llama on disk, token ids and its logits."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**deepcopy({**BASE, **overrides}))).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    model.save_pretrained(folder)
    ids = torch.randint(0, BASE["vocab_size"], (2, 24))
    with torch.no_grad():
        return folder, ids, model(ids).logits


def _import(source: Path, target: Path) -> Path:
    cfg = ImportConfig(source=str(source), output_dir=str(target))
    import_.check(cfg)
    import_.run(cfg)
    return target


@pytest.mark.parametrize("name", MODELS)
def test_import_then_export(ranks, tmp_path, name):
    """Logits of transformers at TP 1 (and 2), and the very tensors back."""
    source, ids, want = _hf(tmp_path / "hf", **MODELS[name])
    model = _import(source, tmp_path / "model")
    sizes = [1] if name == "mqa_wide_heads" else [1, 2]
    for size in sizes:
        parallel = ParallelConfig(tensor_model_parallel_size=size)
        for got in ranks.run(size, megatron_logits, str(model), parallel, ids):
            assert (got - want).abs().max() < 1e-4
    cfg = ExportConfig(checkpoint=str(model), output_dir=str(tmp_path / "out"))
    export.run(cfg)
    before = AutoModelForCausalLM.from_pretrained(source).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def _scores(folder: Path, model: Path) -> Path:
    """Random scores of every axis as a result folder."""
    from nemo_minitron.checkpoint.artifact import output_folder
    from nemo_minitron.config.model import ModelConfig
    from nemo_minitron.config.stages import ImportanceConfig
    from nemo_minitron.pruning.scores import Scores, model_meta

    config = ModelConfig.load(model / "checkpoint")
    layers, heads = config.num_layers, config.num_attention_heads
    scores = Scores(
        hidden=torch.rand(config.hidden_size),
        ffn=torch.rand(layers, config.ffn_hidden_size),
        head=torch.rand(layers, heads),
        layer=torch.rand(layers),
    )
    scores.meta = {"model": model_meta(config), "layers": list(range(layers))}
    cfg = ImportanceConfig(checkpoint=str(model), output_dir=str(folder))
    cfg.data.path = "-"
    with output_folder(cfg, "importance", {}) as work:
        scores.save(work)
    return folder


@pytest.mark.parametrize(
    "target",
    [
        {"ffn_hidden_size": 40},
        {"hidden_size": 42},
        {"num_attention_heads": 2},
        {"num_layers": 2},
        {"hidden_size": 36, "ffn_hidden_size": 24, "num_attention_heads": 2, "num_layers": 2},
    ],
    ids=lambda target: "_".join(target),
)
def test_pruned_export_is_what_megatron_runs(ranks, tmp_path, target):
    """Also where the heads do not divide hidden_size, which transformers' LlamaConfig refuses."""
    torch.manual_seed(1)
    source, ids, _ = _hf(tmp_path / "hf")
    model = _import(source, tmp_path / "model")
    cfg = PruneConfig(
        checkpoint=str(model),
        importance=str(_scores(tmp_path / "scores", model)),
        output_dir=str(tmp_path / "pruned"),
        pruning=PruningConfig(target=TargetConfig(**target)),
    )
    prune.check(cfg)
    prune.run(cfg)
    exported = ExportConfig(checkpoint=str(tmp_path / "pruned"), output_dir=str(tmp_path / "out"))
    export.run(exported)
    (got,) = ranks.run(1, megatron_logits, str(tmp_path / "pruned"), ParallelConfig(), ids)
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
    assert (got - want).abs().max() < 1e-4

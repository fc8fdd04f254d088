"""A pruned export through the ``gguf`` writer, as llama.cpp's converter uses it, and back.

head_dim is not hidden / heads, the FFN size is odd, a layer is gone. The
converter itself, lm-eval and vLLM are not installed here: ``benchmarks/pruned_export.py``.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import (
    ExportConfig,
    ImportConfig,
    PruneConfig,
    PruningConfig,
    TargetConfig,
)
from nemo_minitron.stages import export, import_, prune
from tests.helpers.bad_input import write_scores
from tests.helpers.gguf_fixtures import llama, write_gguf

TARGETS = {
    "llama": {"hidden_size": 40, "ffn_hidden_size": 41, "num_layers": 2},
    # 42 is no multiple of the heads, which transformers' Llama does not take: a Mistral
    "mistral": {
        "hidden_size": 42,
        "ffn_hidden_size": 33,
        "num_layers": 2,
        "num_attention_heads": 4,
        "num_query_groups": 2,
    },
}


def import_and_export(source: Path, home: Path) -> Path:
    import_.run(ImportConfig(source=str(source), output_dir=str(home / "imported")))
    export.run(ExportConfig(checkpoint=str(home / "imported"), output_dir=str(home / "back")))
    return home / "back"


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(40)[None]).logits


@pytest.fixture(scope="module", params=TARGETS)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``hf``: a pruned export; ``model.gguf``: the same."""
    home = tmp_path_factory.mktemp(request.param)
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 24}
    llama(**sizes, tie_word_embeddings=request.param == "mistral").save_pretrained(home / "source")
    import_.run(ImportConfig(source=str(home / "source"), output_dir=str(home / "whole")))
    write_scores(home / "scores", home / "whole")
    pruning = PruningConfig(target=TargetConfig(**TARGETS[request.param]))
    prune.run(
        PruneConfig(
            checkpoint=str(home / "whole"),
            importance=str(home / "scores"),
            output_dir=str(home / "pruned"),
            pruning=pruning,
        )
    )
    export.run(ExportConfig(checkpoint=str(home / "pruned"), output_dir=str(home / "hf")))
    model = AutoModelForCausalLM.from_pretrained(home / "hf")
    assert model.config.model_type == request.param
    assert model.config.head_dim * model.config.num_attention_heads != model.config.hidden_size
    write_gguf(home / "model.gguf", model)
    return home


def test_it_comes_back_through_import(home: Path) -> None:
    back = import_and_export(home / "model.gguf", home)
    before, after = (load_file(folder / "model.safetensors") for folder in (home / "hf", back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("kv_channels", "ffn_hidden_size", "hidden_size", "num_layers"):
        pruned, imported = (
            ModelConfig.load(home / result / "checkpoint") for result in ("pruned", "imported")
        )
        assert getattr(pruned, name) == getattr(imported, name)
    model, again = (AutoModelForCausalLM.from_pretrained(path) for path in (home / "hf", back))
    assert torch.equal(logits(model), logits(again))

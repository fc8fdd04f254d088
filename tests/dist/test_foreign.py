"""Checkpoints that Megatron-LM and Megatron-Bridge themselves wrote: our logits are theirs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import nemo_minitron
from nemo_minitron.checkpoint import torch_dist
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportConfig
from nemo_minitron.stages import import_
from tests.cases import hybrid_program
from tests.cases.live_truth import layout
from tests.cases.source import logits_of
from tests.helpers import foreign
from tests.helpers.pool import WorkerPool

# Folder -> what is particular about it, as fields of the config that must be found.
CHECKPOINTS: dict[str, dict[str, object]] = {
    # Megatron-LM of core 0.16.1
    "llama_tp2pp2": {"family": "llama", "num_layers": 4, "vocab_size": 64},
    "vpp": {"family": "llama", "num_layers": 4},
    "uneven": {"family": "llama", "num_layers": 4},
    "tied": {"share_embeddings_and_output_weights": True},
    "bf16": {"dtype": "bfloat16"},
    "qk": {"family": "qwen3", "qk_layernorm": True, "kv_channels": 12},
    "qkvbias": {"family": "qwen2", "add_qkv_bias": True},
    "ropescale": {"rotary_base": 500000.0},
    "distopt": {"family": "llama"},
    "gpt2": {"family": "gpt2", "position_embedding_type": "learned_absolute"},
    "pad": {"family": "llama", "vocab_size": 50},
    "eps": {"family": "llama", "layernorm_epsilon": 0.1},
    "nemotron": {"family": "nemotron", "layernorm_zero_centered_gamma": True},
    "mixtral": {"family": "mixtral", "num_moe_experts": 4},
    "mixtral_ep2": {"family": "mixtral", "num_moe_experts": 4},
    "qwen2moe": {"family": "qwen2_moe", "moe_shared_expert_intermediate_size": 20},
    # Megatron-LM of core 0.19.0
    "v19_distopt": {"family": "llama", "num_layers": 4},
    "v19_mixtral": {"family": "mixtral", "layernorm_epsilon": 0.1},
    # Megatron-Bridge 0.3.1 and 0.6.2
    "bridge03": {"family": "llama", "layernorm_epsilon": 0.01, "vocab_size": 50},
    "bridge06": {"family": "llama", "layernorm_epsilon": 0.01, "vocab_size": 50},
}

# Megatron-LM of core 0.16.1, models that no family here is.
REFUSED = {
    "gpt2_rope": (
        "no supported family has this position_embedding_type (position_embedding_type=rope)"
    ),
    "swiglu_bias": "no supported family has this add_bias_linear (add_bias_linear=True)",
    "mtp": "no supported family has this mtp_num_layers (mtp_num_layers=1)",
    "qkl2": "qk_l2_norm=True is not supported; only false",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(REFUSED[name])):
        open_source(str(foreign.unpack(name, tmp_path)))


@pytest.fixture(scope="module")
def opened(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the checkpoints, imported one after another."""
    home = tmp_path_factory.mktemp("foreign")
    results = {}
    for name in CHECKPOINTS:
        source = foreign.unpack(name, home / "theirs")
        cfg = ImportConfig(source=str(source), output_dir=str(home / "ours" / name))
        import_.check(cfg)
        import_.run(cfg)
        results[name] = cfg.output_dir
    return results


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_config(opened: dict[str, str], name: str) -> None:
    config = ModelConfig.load(Path(opened[name]) / "checkpoint")
    assert {key: getattr(config, key) for key in CHECKPOINTS[name]} == CHECKPOINTS[name]


def test_logits(ranks: WorkerPool, opened: dict[str, str]) -> None:
    theirs = Path(next(iter(opened.values()))).parent.parent / "theirs"
    ids, _ = foreign.logits(theirs / "eps")
    (ours,) = ranks.run(1, logits_of, opened, ids, layout())
    for name, found in ours.items():
        same_ids, wanted = foreign.logits(theirs / name)
        assert torch.equal(same_ids, ids)
        atol = 0.02 if name == "bf16" else 1e-5  # there their forward pass has 8 bits, ours 24
        torch.testing.assert_close(found, wanted[..., : found.size(-1)], atol=atol, rtol=0)


@pytest.mark.parametrize(
    ("family", "there", "here"),
    [
        ("nemotron_h", (2, 1), (1, 2)),
        ("nemotron_h", (1, 2), (2, 1)),
        ("llama", (2, 1), (1, 2)),
    ],
)
def test_hybrid_model(
    ranks: WorkerPool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    there: tuple[int, int],
    here: tuple[int, int],
) -> None:
    """Megatron-Core's HybridModel (TP, PP) opens here, ours opens there, at other layouts.

    One of attention and MLP alone goes to transformers as a Llama.
    """
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(7))

    def logits(task: Any, *arguments: object) -> Any:
        return ranks.run(2, task, *arguments)[1]  # the last stage

    def imported(name: str) -> str:
        cfg = ImportConfig(source=str(tmp_path / "theirs"), output_dir=str(tmp_path / name))
        import_.check(cfg)
        import_.run(cfg)
        return cfg.output_dir

    theirs = logits(hybrid_program.write, str(tmp_path / "theirs"), family, *there, ids)
    results = {"ours": imported("ours")}
    # As earlier versions wrote them, which did not know what else HybridModel asks for.
    monkeypatch.setattr(torch_dist, "extra_states", lambda *_: iter(()))
    results["before"] = imported("before")
    found = logits(logits_of, results, ids, layout(tp=here[0], pp=here[1]))
    for ours in found.values():
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    again = logits(hybrid_program.read, f"{results['ours']}/checkpoint", family, *here, ids)
    torch.testing.assert_close(again, theirs, atol=1e-5, rtol=0)
    if family == "llama":
        nemo_minitron.export(results["ours"], tmp_path / "hf")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert isinstance(model, LlamaForCausalLM)
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, theirs, atol=1e-5, rtol=0)

"""The worked example of docs/adding-a-family.md is a family that imports, prunes and exports."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from nemo_minitron.checkpoint.hf import open_hf, to_hf, to_megatron, write_hf
from nemo_minitron.families.registry import FAMILIES, read_config, written_config
from nemo_minitron.families.table import Family
from nemo_minitron.pruning.plan import full_plan, pruned_config
from nemo_minitron.pruning.slicing import prune_store

PAGE = Path(__file__).parents[2] / "docs" / "adding-a-family.md"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-3,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture
def family(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The family that the code on the page makes, registered."""
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert code is not None
    module: dict[str, Any] = {}
    exec(code[1], module)
    made: Family = module["ARCEE"]
    monkeypatch.setitem(FAMILIES, made.name, made)
    return made


def test_the_family_on_the_page(family: Family, tmp_path: Path) -> None:
    """Cutting channels and layers that write nothing leaves transformers' logits as they are."""
    torch.manual_seed(0)
    model = transformers.ArceeForCausalLM(transformers.ArceeConfig(**SIZES)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 10:].zero_()
        for linear in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn.o_proj):
            linear.weight.zero_()
    source, exported = tmp_path / "source", tmp_path / "exported"
    model.save_pretrained(source)
    hf_config, hf_store = open_hf(source)
    found, config = read_config(hf_config)
    assert found is family
    plan = full_plan(replace(config, num_layers=2, ffn_hidden_size=10)).replaced(layer=[0, 2])
    small = pruned_config(config, plan)
    store = prune_store(family, config, plan, to_megatron(family, config, hf_store))
    exported.mkdir()
    write_hf(exported, to_hf(family, small, store), written_config(small), "5GB")
    assert load_file(exported / "model.safetensors").keys() < model.state_dict().keys()
    again = transformers.AutoModelForCausalLM.from_pretrained(exported)
    assert isinstance(again, transformers.ArceeForCausalLM)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits)

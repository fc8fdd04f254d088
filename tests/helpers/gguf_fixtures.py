"""Writes small Llama models as llama.cpp's converter would."""

from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM

from tests.unit.test_families import hf_llama

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
SPECIAL = ["<|end|>", "<|start|>", "<|pad|>"]
TEXT = (
    "In 1776, on July 4th, they declared: 'we don't   wait'.\n\n\tTabs, "
    "caf\u00e9s \u65e5\u672c \U0001f389 and 12345."
)


def llama(**overrides) -> LlamaForCausalLM:
    """A model whose rows can be quantised in blocks of 32."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
    }
    config = hf_llama(**{**sizes, "num_key_value_heads": 2, "rope_theta": 5e4, **overrides})
    return LlamaForCausalLM(config)


def gguf_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{LAYER_NAMES[rest.removesuffix('.weight')]}.weight"


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's LlamaModel.permute."""
    rows = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, rows, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def tokenizer() -> Tokenizer:
    """SmolLM's kind: digits one by one, byte-level BPE."""
    result = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    result.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=288, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    result.train_from_iterator([TEXT] * 3, trainer)
    return result


def add_tokenizer(writer: GGUFWriter, add_bos: bool | None, pre: str) -> None:
    import json

    source = tokenizer()
    tokens = [source.id_to_token(i) for i in range(source.get_vocab_size())]
    merges = json.loads(source.to_str())["model"]["merges"]
    kinds = [TokenType.CONTROL if t in SPECIAL else TokenType.NORMAL for t in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(2)
    if add_bos is not None:
        writer.add_add_bos_token(add_bos)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}{% endfor %}")


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    matrices: Kind = Kind.F32,
    *,
    embedding: Kind | None = None,
    add_bos: bool | None = False,
    pre: str = "smollm",
    fields: dict | None = None,
    drop: str = "",
    extra: dict | None = None,
    changed: dict | None = None,
    raw: dict | None = None,
    arch: str = "llama",
) -> dict[str, np.ndarray]:
    """Write ``model``; returns what each tensor, under its Hugging Face name, was quantised to."""
    config, stored = model.config, {}
    writer = GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    add_tokenizer(writer, add_bos, pre)
    adders = {str: writer.add_string, list: writer.add_array, float: writer.add_float32}
    for key in changed or {}:
        del writer.kv_data[0][key]
    for key, value in {**(changed or {}), **(fields or {})}.items():
        adders.get(type(value), writer.add_uint32)(key, value)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        if drop and drop in name:
            continue
        kind = Kind.F32 if parameter.dim() == 1 else matrices
        if embedding is not None and "embed_tokens" in name:
            kind = embedding
        array = parameter.detach().numpy()
        stored[name] = quantize(array, kind)
        part = name.split(".")[-2]
        if part in heads:
            array = permute(array, heads[part])
        writer.add_tensor(gguf_name(name), quantize(array, kind), raw_dtype=kind)
    for name, array in (extra or {}).items():
        writer.add_tensor(name, array)
    for name, (array, kind) in (raw or {}).items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored

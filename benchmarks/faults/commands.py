"""The command lines that the campaign disturbs, and the files that they read."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

VOCAB = 259
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "vocab_size": VOCAB,
}
DATA = ("data.path=tokens.npy", "data.seq_length=16", "data.micro_batch_size=1")
TRAIN = (
    *("trainer.limit_val_batches=0", "trainer.max_steps=6", "trainer.save_every_n_steps=2"),
    *("optim.lr_warmup_steps=0", "data.global_batch_size=2"),
)
STAGES: Mapping[str, tuple[str, ...]] = {
    "import": ("source=source",),
    "importance": (
        *("checkpoint=base/teacher", *DATA, "data.global_batch_size=1", "data.num_samples=8"),
        "save_every_n_samples=2",
    ),
    "prune": (
        *("checkpoint=base/teacher", "importance=base/scores"),
        "pruning.target.ffn_hidden_size=32",
    ),
    "distill": ("student=base/pruned", "teacher=base/teacher", *DATA, *TRAIN),
    "finetune": ("checkpoint=base/pruned", *DATA, *TRAIN),
    "teacher_logits": (
        *("checkpoint=base/teacher", *DATA, *TRAIN[:2], "data.global_batch_size=2"),
        *("shard_samples=2", "top_k=4"),
    ),
    "search": (
        *("checkpoint=base/teacher", "importance=base/scores", *DATA, "data.num_samples=2"),
        *("data.global_batch_size=1", "data.split_name=train"),
        "search.ffn_hidden_size=[32,40]",
    ),
    "evaluate": ("checkpoint=base/pruned", *DATA, "data.global_batch_size=1"),
    "export": ("checkpoint=base/pruned",),
}
RANKED = ("importance", "distill", "finetune", "teacher_logits", "search", "evaluate")
LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "1": (),
    "tp2": ("parallel.tensor_model_parallel_size=2",),
    "pp2": ("parallel.pipeline_model_parallel_size=2",),
}
INPUTS: Mapping[str, tuple[str, ...]] = {
    "import": ("source/model.safetensors", "source/config.json"),
    "importance": ("base/teacher", "tokens.npy"),
    "prune": ("base/teacher", "base/scores"),
    "distill": ("base/pruned", "base/teacher"),
    "finetune": ("base/pruned",),
    "teacher_logits": ("base/teacher",),
    "search": ("base/scores", "base/teacher"),
    "evaluate": ("base/pruned",),
    "export": ("base/pruned",),
}


def write_source(work: Path) -> None:
    """A tiny Llama with random weights in Hugging Face's format, and tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(work / "source")
    np.save(work / "tokens.npy", np.random.default_rng(0).integers(0, VOCAB, (32, 16)))

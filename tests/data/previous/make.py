"""Made previous.tar.xz: results, a pipeline and unfinished work of the version in the checkout.

Run from a checkout of that version: ``python make.py FOLDER``, then ``tar cJf previous.tar.xz`` of
what is in FOLDER. The stops are put where a signal would have come, so that they are always there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from nemo_minitron import cli
from nemo_minitron.runtime.errors import Preempted

VOCAB = 259
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": VOCAB,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}
PIPELINE = """\
# @package _global_
output_dir: run
inputs: {model: source, tokens: tokens.npy, ffn: 16}
stages:
  - {name: teacher, stage: import, config: {source: "${inputs.model}"}}
  - name: scores
    stage: importance
    config:
      checkpoint: ${stage:teacher}
      data: {path: "${inputs.tokens}", seq_length: 8, num_samples: 4, global_batch_size: 1}
  - name: pruned
    stage: prune
    config:
      checkpoint: ${stage:teacher}
      importance: ${stage:scores}
      pruning: {target: {ffn_hidden_size: "${inputs.ffn}"}}
"""
DATA = ["data.path=tokens.npy", "data.seq_length=8", "data.micro_batch_size=1"]
STEPS = ["trainer.max_steps=4", "trainer.limit_val_batches=0", "optim.lr_warmup_steps=0"]
UNFINISHED = {
    "finetune": ["checkpoint=run/pruned", *DATA, "data.global_batch_size=2", *STEPS],
    "importance": [
        *("checkpoint=run/teacher", *DATA, "data.global_batch_size=1", "data.num_samples=6"),
        "save_every_n_samples=2",
    ],
    "teacher_logits": [
        *("checkpoint=run/teacher", *DATA, "data.global_batch_size=2", *STEPS[:2]),
        *("shard_samples=2", "top_k=4"),
    ],
    "generate": [
        *("checkpoint=run/teacher", "prompts=prompts.txt", "sampling.max_new_tokens=4"),
        *("save_every_n_samples=1", "batch_size=1", "filters.min_tokens=1"),
        "filters.max_repetition=1",
    ],
    "search": [
        *("checkpoint=run/teacher", "importance=run/scores", "search.ffn_hidden_size=[16,20]"),
        *(*DATA, "data.global_batch_size=1", "data.num_samples=2", "data.split_name=train"),
    ],
}


def source() -> None:
    """A tiny Llama with a tokenizer of bytes, tokens and prompts."""
    folder = Path("source")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    draw = torch.Generator().manual_seed(0)
    hidden, ffn = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, hidden),
        "model.norm": (hidden,),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        shapes |= {f"{own}self_attn.{x}_proj": (hidden, hidden) for x in "qkvo"}
        shapes |= {f"{own}mlp.{x}_proj": (ffn, hidden) for x in ("gate", "up")}
        shapes |= {f"{own}mlp.down_proj": (hidden, ffn)}
        shapes |= {f"{own}{x}_layernorm": (hidden,) for x in ("input", "post_attention")}
    weights = {f"{n}.weight": torch.randn(s, generator=draw) * 0.2 for n, s in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": 257, "<pad>": 258}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    np.save("tokens.npy", np.random.default_rng(0).integers(0, VOCAB, (16, 8)))
    Path("prompts.txt").write_text("one\ntwo\nthree\nfour\n")


def stop_after(calls: int, function):
    """The function, which stops its stage once it was called so often."""
    left = [calls]

    def stopping(*args, **kwargs):
        result = function(*args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            raise Preempted("here the old run was stopped")
        return result

    return stopping


def unfinished(stage: str, arguments: list[str]) -> None:
    """A run that was told to stop after half of its work."""
    from nemo_minitron.importance.resume import SavedState
    from nemo_minitron.runtime.stop import StopOnRequest
    from nemo_minitron.stages import candidates

    kept = SavedState.after, StopOnRequest.asked, candidates._keep
    calls = [0]

    def asked(self) -> bool:
        calls[0] += 1
        return calls[0] >= 2

    StopOnRequest.asked = asked
    SavedState.after = stop_after(4, SavedState.after)
    candidates._keep = stop_after(1, candidates._keep)
    code = cli.main([stage, *arguments, f"output_dir=unfinished/{stage}"])
    SavedState.after, StopOnRequest.asked, candidates._keep = kept
    assert code == 75, (stage, code)
    assert Path(f"unfinished/{stage}.partial").is_dir()


def main(folder: str) -> None:
    """Everything, in a new folder; paths are relative to it."""
    Path(folder).mkdir()
    os.chdir(folder)
    source()
    Path("conf/experiment").mkdir(parents=True)
    Path("conf/experiment/previous.yaml").write_text(PIPELINE)
    flags = ["--config-dir", "conf", "experiment=previous"]
    assert cli.main(["pipeline", *flags]) == 0
    for stage, arguments in UNFINISHED.items():
        unfinished(stage, arguments)


if __name__ == "__main__":
    main(sys.argv[1])

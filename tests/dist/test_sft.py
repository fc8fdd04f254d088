"""Losses on SFT records are those of transformers on each record alone, at every layout."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from tests.cases.kd import read_gradients
from tests.cases.sft import gradients
from tests.dist.test_distillation import _hf_model
from tests.helpers.sft_fixtures import chat_tokenizer, conversations, loaded, write_records
from tests.helpers.tiny import DEEPSEEK_V3, GEMMA3, GPT2, GPT_OSS, LLAMA, MINISTRAL3, write_weights

TEACHER = replace(LLAMA, num_layers=4, hidden_size=48)
STUDENT = replace(LLAMA, hidden_size=32, ffn_hidden_size=48)
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "dp2": (2, ParallelConfig()),
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "cp2": (2, ParallelConfig(context_parallel_size=2)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "tp2_cp2": (
        4,
        ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2),
    ),
}
LOSS = {"ce_weight": 0.5, "temperature": 2.0}
RECORDS = 14
# fp32 against fp64: a sum over the tokens of all records.
TOLERANCE = 1e-5


class Case:
    """A student, its teacher and records; gradients of layouts and of transformers."""

    def __init__(self, ranks, folder: Path, student, teacher) -> None:
        self.ranks, self.folder = ranks, folder
        vocab = chat_tokenizer(folder / "tokenizer")
        self.records = conversations(RECORDS)
        write_records(folder / "a.jsonl", self.records)
        self.student = replace(student, vocab_size=vocab), str(folder / "student")
        self.teacher = replace(teacher, vocab_size=vocab), str(folder / "teacher")
        for seed, (config, path) in enumerate((self.student, self.teacher)):
            write_weights(Path(path), config, seed)
        self.want = self._transformers()

    def run(self, layout: str, **data):
        """Sums and gradients of a layout, of one kind of samples."""
        size, parallel = LAYOUTS[layout]
        out = self.folder / f"{layout}{sorted(data.items())}"
        keys = {
            "path": str(self.folder / "a.jsonl"),
            "tokenizer": str(self.folder / "tokenizer"),
            "cache": str(self.folder / "cache"),
        }
        cases = {str(out): {"data": data, "loss": LOSS}}
        found = self.ranks.run(size, gradients, self.student, self.teacher, parallel, keys, cases)
        assert all(one == found[0] for one in found)
        return found[0][str(out)], read_gradients(out, self.student[0])

    def _transformers(self):
        """Every record alone, in fp64, its answers marked by transformers."""
        from nemo_minitron.checkpoint.hf import to_megatron
        from nemo_minitron.checkpoint.lazy import from_tensor
        from nemo_minitron.data.chat import encode

        student, teacher = (
            _hf_model(one, self.folder).double() for one in (self.student, self.teacher)
        )
        for one in (student, teacher):  # torch's grouped products of experts take no fp64
            one.config._experts_implementation = "eager"
        # Gemma's embedding of transformers learns nothing of token 0, which ends texts here.
        student.get_input_embeddings().padding_idx = None
        tokenizer, heat = loaded(self.folder / "tokenizer"), LOSS["temperature"]
        kd, ce, tokens = torch.zeros(3, dtype=torch.float64)
        for record in self.records:
            ids, answer = map(torch.from_numpy, encode(record, tokenizer, "here"))
            logits = student(ids[None, :-1].long()).logits[0]
            with torch.no_grad():
                target = teacher(ids[None, :-1].long()).logits[0]
            log_p, log_t = (logits / heat).log_softmax(-1), (target / heat).log_softmax(-1)
            kd = kd + (log_t.exp() * (log_t - log_p)).sum(-1)[answer[1:]].sum()
            losses = torch.nn.functional.cross_entropy(logits, ids[1:].long(), reduction="none")
            ce, tokens = ce + losses[answer[1:]].sum(), tokens + answer[1:].sum()
        ((kd + LOSS["ce_weight"] * ce) / tokens).backward()
        found = {name: from_tensor(p.grad) for name, p in student.named_parameters()}
        named = to_megatron(family_of(self.student[0]), self.student[0], found)
        sums = [float(value.detach()) for value in (kd, ce, tokens)]
        return sums, {name: tensor.read() for name, tensor in named.items()}

    def check(self, sums, got) -> None:
        """Compare with transformers."""
        assert sums[2] == self.want[0][2]
        assert sums == pytest.approx(self.want[0], rel=TOLERANCE)
        for name, tensor in self.want[1].items():
            error = float((got[name] - tensor).norm() / tensor.norm())
            assert error < TOLERANCE, f"{name}: relative error {error:.2e}"


@pytest.fixture(scope="module")
def llama(ranks, tmp_path_factory) -> Case:
    return Case(ranks, tmp_path_factory.mktemp("sft"), STUDENT, TEACHER)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_samples_at_every_layout(llama, layout):
    llama.check(*llama.run(layout))


@pytest.mark.parametrize("layout", ["single", "cp2"])
def test_each_record_alone_and_larger_micro_batches(llama, layout):
    """Padded samples have no documents; micro-batches weigh their tokens, not their number."""
    llama.check(*llama.run(layout, pack=False))
    llama.check(*llama.run(layout, micro_batch_size=2))


@pytest.mark.parametrize(
    "model", [GEMMA3, DEEPSEEK_V3, GPT2, MINISTRAL3, GPT_OSS], ids=lambda model: model.family
)
def test_other_attention(ranks, tmp_path, model):
    """Windows longer than some records, two rotations; latents; positions that are learnt.

    Queries that are scaled by position; sinks.
    """
    case = Case(ranks, tmp_path, replace(model, ffn_hidden_size=48), model)
    case.check(*case.run("cp2"))
    case.check(*case.run("single", micro_batch_size=2))

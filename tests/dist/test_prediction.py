"""Layers for multi-token prediction: what they compute, what trains them, what is refused.

The oracle is the formula of 2412.19437, section 2.2, in plain torch around a layer of transformers,
which itself skips these layers. In and out, pruned and at layouts: ``test_families.py``.
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint.hf import to_hf, write_hf
from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.source import open_source
from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.table import parameter_count
from nemo_minitron.planning.shares import shares
from nemo_minitron.pruning.targets import check_pruning
from tests.cases.kd import batches, kd_gradients, read_gradients
from tests.cases.live_truth import layout
from tests.cases.prediction import prediction_logits
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import (
    DEEPSEEK_EXPERTS,
    GLM4_MOE,
    random_weights,
    token_batch,
    write_weights,
)

GLM = replace(GLM4_MOE, moe_router_num_groups=None, moe_router_group_topk=None, mtp_num_layers=1)
GLM = replace(GLM.resized({}, [0, 1]), moe_router_topk=2, num_moe_experts=4)
DEEPSEEK = DEEPSEEK_EXPERTS.resized({}, [0, 1])
DEEPSEEK = replace(DEEPSEEK, moe_router_num_groups=None, moe_router_group_topk=None)
MODELS = {"glm4_moe": GLM, "deepseek_v3": replace(DEEPSEEK, mtp_num_layers=1)}
LAYOUTS = {
    "tp2": layout(tp=2, sp=True),
    "pp2": layout(pp=2),
    "cp2": layout(cp=2),
    "ep2": layout(dp=2, ep=2),
}
IDS = token_batch(3, 16, 101)[:, :16].contiguous()


class Plain:
    """A model of transformers with one layer more, and the formula around that layer."""

    def __init__(self, config: ModelConfig, weights: Path, home: Path) -> None:
        family = family_of(config)
        store = read_torch_dist(weights, family, config)
        written = {**family.to_hf(config), "num_hidden_layers": config.num_layers + 1}
        folder = home / f"{weights.name}_hf"
        folder.mkdir()
        write_hf(folder, to_hf(family, config, store), written, "5GB")
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        )
        self.prefix, self.eps = f"model.layers.{config.num_layers}.", config.layernorm_epsilon
        names = ("enorm", "hnorm", "eh_proj", "shared_head.norm")
        tensors = load_file(folder / "model.safetensors")
        self.own = {n: tensors[f"{self.prefix}{n}.weight"].requires_grad_() for n in names}
        self.layer = self.model.model.layers[config.num_layers]
        self.model.model.layers = self.model.model.layers[: config.num_layers]

    def norm(self, x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], self.own[name], self.eps)

    def logits(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """``[b, s, v]`` of the next token, ``[b, s - 1, v]`` of the one after it."""
        hidden = self.model.model(ids).last_hidden_state
        later = self.model.model.embed_tokens(ids[:, 1:])
        both = [self.norm(later, "enorm"), self.norm(hidden[:, :-1], "hnorm")]
        x = torch.cat(both, dim=-1) @ self.own["eh_proj"].t()
        length = x.size(1)
        positions = torch.arange(length)[None]
        out = self.layer(
            x,
            attention_mask=torch.full((length, length), -torch.inf).triu(1)[None, None],
            position_ids=positions,
            position_embeddings=self.model.model.rotary_emb(x, positions),
        )
        out = out[0] if isinstance(out, tuple) else out
        return self.model.lm_head(hidden), self.model.lm_head(self.norm(out, "shared_head.norm"))

    def gradients(self) -> dict[str, Tensor]:
        """By Hugging Face names; transformers holds the matrices of all experts in one."""
        named = [*self.model.named_parameters()]
        named += [(f"{self.prefix}{name}", p) for name, p in self.layer.named_parameters()]
        named += [(f"{self.prefix}{name}.weight", tensor) for name, tensor in self.own.items()]
        return {name: p.grad for name, p in named if ".experts." not in name and p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_the_token_after_the_next(ranks: WorkerPool, tmp_path: Path, name: str) -> None:
    config = MODELS[name]
    write_weights(tmp_path / "model", config, seed=1)
    with torch.no_grad():
        want = Plain(config, tmp_path / "model", tmp_path).logits(IDS)
    for kind, parallel in {"alone": layout(), **LAYOUTS}.items():
        if kind == "cp2":
            continue  # the pieces of a sequence lie elsewhere; gradients are compared below
        arguments = (config, str(tmp_path / "model"), IDS, parallel)
        for found in ranks.run(parallel.world_size(), prediction_logits, *arguments):
            if found is not None:
                for got, logits in zip(found, want, strict=True):
                    error = (got[:, : logits.size(1)] - logits).abs().max()
                    assert error < 2e-4, f"{kind}: {error:.2e}"


def loss_of(student: Plain, teacher: Plain, samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of both divergences, and target tokens."""
    sums, tokens = [torch.zeros(()), torch.zeros(())], torch.zeros(())
    for batch in batches(samples, 16, 101):
        with torch.no_grad():
            targets = teacher.logits(batch["tokens"])
        mask = batch["loss_mask"]
        pairs = zip(student.logits(batch["tokens"]), targets, (mask, mask[:, 1:]), strict=True)
        for number, (logits, target, counts) in enumerate(pairs):
            log_p, log_t = logits.log_softmax(-1), target.log_softmax(-1)
            divergence = (log_t.exp() * (log_t - log_p)).sum(-1)
            sums[number] = sums[number] + (divergence * counts).sum()
        tokens += mask.sum()
    return sums[0], sums[1], tokens


@pytest.mark.parametrize("name", MODELS)
def test_gradients(ranks: WorkerPool, tmp_path: Path, name: str) -> None:
    """Those of the formula on one rank, and those of one rank at every layout."""
    student = MODELS[name]
    teacher = replace(student, hidden_size=48)
    write_weights(tmp_path / "student", student, seed=1)
    write_weights(tmp_path / "teacher", teacher, seed=2)
    pair = (student, str(tmp_path / "student")), (teacher, str(tmp_path / "teacher"))

    def run(kind: str, parallel: Any) -> tuple[Tensor, dict[str, Tensor]]:
        out = tmp_path / kind
        over = {"mtp_weight": 0.3}
        sums = ranks.run(parallel.world_size(), kd_gradients, *pair, parallel, str(out), over)
        assert all(s == sums[0] for s in sums), "ranks disagree about the loss"
        return torch.tensor(sums[0]), read_gradients(out, student)

    sums, alone = run("alone", layout())
    plain = Plain(student, tmp_path / "student", tmp_path)
    kd, mtp, tokens = loss_of(plain, Plain(teacher, tmp_path / "teacher", tmp_path), 4)
    torch.testing.assert_close(sums[[0, 3]], torch.stack([kd, mtp]).detach(), rtol=1e-4, atol=0)
    ((kd + 0.3 * mtp) / tokens).backward()
    store = {key: from_tensor(tensor) for key, tensor in alone.items()}
    got = {key: lazy.read() for key, lazy in to_hf(family_of(student), student, store).items()}
    want = plain.gradients()
    assert {f"{plain.prefix}eh_proj.weight", "lm_head.weight"} <= want.keys()
    for key, tensor in want.items():
        error = (got[key] - tensor).norm() / tensor.norm()
        assert error < 1e-4, f"{key}: relative error {error:.2e}"
    for kind, parallel in LAYOUTS.items():
        there, gradients = run(kind, parallel)
        torch.testing.assert_close(there, sums, rtol=1e-5, atol=1e-6)
        for key, tensor in alone.items():
            if "expert_bias" not in key:  # an expert that no token reached has none
                error = (gradients[key] - tensor).norm()
                assert error <= 1e-4 * tensor.norm(), f"{kind}: {key}: error {error:.2e}"


def test_interleaved_pipeline(ranks: WorkerPool, tmp_path: Path) -> None:
    """The layer lies on the last virtual stage."""
    config = replace(GLM, num_layers=4, moe_layer_freq=[0, 1, 1, 1], kept_layers=[])
    write_weights(tmp_path / "model", config, seed=1)
    pair = ((config, str(tmp_path / "model")),) * 2
    found = []
    for kind, parallel in {"alone": layout(), "pp2_vpp2": layout(pp=2, vpp=2)}.items():
        over = {"kd_weight": 0.0, "ce_weight": 1.0}  # the teacher's divergence from itself is 0
        arguments = (*pair, parallel, str(tmp_path / kind), over)
        each = ranks.run(parallel.world_size(), kd_gradients, *arguments)
        found.append((torch.tensor(each[0]), read_gradients(tmp_path / kind, config)))
    (want_sums, want), (sums, got) = found
    assert want_sums[3] > 0
    torch.testing.assert_close(sums, want_sums, rtol=1e-5, atol=1e-6)
    for key, tensor in want.items():
        if "expert_bias" not in key:
            assert (got[key] - tensor).norm() <= 1e-4 * tensor.norm(), key


def test_labels_where_the_teacher_has_no_such_layer(ranks: WorkerPool, tmp_path: Path) -> None:
    teacher = GLM.without_prediction()
    write_weights(tmp_path / "student", GLM, seed=1)
    write_weights(tmp_path / "teacher", teacher, seed=2)
    pair = (GLM, str(tmp_path / "student")), (teacher, str(tmp_path / "teacher"))
    (sums,) = ranks.run(1, kd_gradients, *pair, layout(), str(tmp_path / "out"), {})
    plain, want = Plain(GLM, tmp_path / "student", tmp_path), torch.zeros(())
    for batch in batches(4, 16, 101):
        later = plain.logits(batch["tokens"])[1].log_softmax(-1)
        picked = later.gather(-1, batch["labels"][:, 1:, None]).squeeze(-1)
        want = want - (picked * batch["loss_mask"][:, 1:]).sum()
    torch.testing.assert_close(torch.tensor(sums[3]), want.detach(), rtol=1e-4, atol=0)


def written(folder: Path) -> Path:
    """A random GLM as it is published."""
    family, store = family_of(GLM), {n: from_tensor(t) for n, t in random_weights(GLM).items()}
    folder.mkdir()
    write_hf(folder, to_hf(family, GLM, store), family.to_hf(GLM), "5GB")
    return folder


def test_weights_that_are_not_there_or_not_shared_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "hf")
    tensors, config = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    own = {**tensors, "model.layers.2.embed_tokens.weight": torch.zeros(101, 64)}
    save_file(own, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"embed_tokens.weight is not equal to .* source_ignore="):
        open_source(str(folder), None)
    bare = {name: t for name, t in tensors.items() if "layers.2." not in name}
    save_file(bare, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"saved without .*source_ignore=\[num_nextn_predict"):
        open_source(str(folder), None)
    opened = open_source(str(folder), None, None, ["num_nextn_predict_layers"])
    assert opened.config.mtp_num_layers is None
    config["num_nextn_predict_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="num_nextn_predict_layers=2 is not supported"):
        open_source(str(folder), None)
    shutil.rmtree(folder)


@pytest.mark.parametrize("target", [{"ffn_hidden_size": 48}, {"num_moe_experts": 2}])
def test_sizes_inside_are_refused(target: dict[str, int | None]) -> None:
    with pytest.raises(ValueError, match=r"for a model with mtp_num_layers=1.* source_ignore="):
        check_pruning(GLM, PruningConfig(target=TargetConfig(target)))


def test_models_that_cannot_have_them() -> None:
    with pytest.raises(ValueError, match="mtp_num_layers=0 must be at least 1"):
        replace(GLM, mtp_num_layers=0)
    with pytest.raises(ValueError, match="embeddings are not tied"):
        replace(GLM, share_embeddings_and_output_weights=True)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_stages_are_those_of_the_model(name: str) -> None:
    """The last of two stages has the embeddings once more; two ranks share the experts out."""
    config, word = MODELS[name], MODELS[name].vocab_size * MODELS[name].hidden_size
    total = parameter_count(family_of(config), config)["total"]
    assert sum(share.total for share in shares(config, layout())) == total
    assert sum(share.total for share in shares(config, layout(pp=2))) == total + word
    (split,) = shares(config, layout(dp=2, ep=2))
    assert split.dense + 2 * split.expert == total

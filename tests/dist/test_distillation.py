"""Distillation at every layout gives the gradients of the single rank, and of transformers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from tests.cases.kd import batches, kd_gradients, read_gradients, train_with_masked_step
from tests.helpers.tiny import LLAMA, write_weights

TEACHER = replace(LLAMA, num_layers=8, hidden_size=48)
STUDENT = replace(LLAMA, num_layers=4, hidden_size=32, ffn_hidden_size=48)
LAYOUTS = {
    "tp2": (2, ParallelConfig(tensor_model_parallel_size=2)),
    "tp2_sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "tp4": (4, ParallelConfig(tensor_model_parallel_size=4)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
    "pp2_vpp2": (
        2,
        ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    ),
    "cp2": (2, ParallelConfig(context_parallel_size=2)),
    "dp2": (2, ParallelConfig()),
    "tp2_sp_pp2": (
        4,
        ParallelConfig(
            tensor_model_parallel_size=2, sequence_parallel=True, pipeline_model_parallel_size=2
        ),
    ),
}


def _close(got: torch.Tensor, want: torch.Tensor, name: str, tolerance: float = 1e-4) -> None:
    error = (got - want).norm() / want.norm()
    assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, tmp_path_factory):
    """Student and teacher checkpoints and the single-rank reference."""
    folder = tmp_path_factory.mktemp("kd")
    student = replace(STUDENT, share_embeddings_and_output_weights=request.param)
    write_weights(folder / "student", student, 1)
    write_weights(folder / "teacher", TEACHER, 2)
    return (student, str(folder / "student")), (TEACHER, str(folder / "teacher")), folder


def _run(ranks, pair, layout: str, **over):
    student, teacher, folder = pair
    size, parallel = (1, ParallelConfig()) if layout == "single" else LAYOUTS[layout]
    out = folder / f"{layout}{sorted(over.items())}"
    if not out.exists():
        sums = ranks.run(size, kd_gradients, student, teacher, parallel, str(out), over)
        (out / "sums.json").write_text(json.dumps(sums[0]))
        assert all(s == sums[0] for s in sums), "ranks disagree about the loss"
    sums = torch.tensor(json.loads((out / "sums.json").read_text()))
    return sums, read_gradients(out, student[0])


def _hf_model(pair_member, folder: Path):
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoint.hf import to_hf, write_hf

    config, path = pair_member
    family = family_of(config)
    store = read_torch_dist(Path(path), family, config)
    target = folder / f"hf-{Path(path).name}"
    target.mkdir(exist_ok=True)
    write_hf(target, to_hf(family, config, store), family.to_hf(config), "5GB")
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


@pytest.mark.parametrize(
    "over", [{}, {"ce_weight": 0.5, "temperature": 2.0}], ids=["kd", "kd_ce_t2"]
)
def test_gradients_equal_transformers(ranks, pair, over):
    """Loss and gradients are those of a plain computation with transformers and torch."""
    from nemo_minitron.checkpoint.hf import to_megatron
    from nemo_minitron.checkpoint.lazy import from_tensor

    sums, got = _run(ranks, pair, "single", **over)
    student, teacher = _hf_model(pair[0], pair[2]), _hf_model(pair[1], pair[2])
    temperature, ce_weight = over.get("temperature", 1.0), over.get("ce_weight", 0.0)
    kd, ce, tokens = (torch.zeros(()) for _ in range(3))
    for batch in batches(4, 16, STUDENT.vocab_size):
        logits = student(batch["tokens"]).logits
        with torch.no_grad():
            target = teacher(batch["tokens"]).logits
        mask = batch["loss_mask"]
        log_p = (logits / temperature).log_softmax(-1)
        log_t = (target / temperature).log_softmax(-1)
        kd = kd + (((log_t.exp() * (log_t - log_p)).sum(-1)) * mask).sum()
        picked = logits.log_softmax(-1).gather(-1, batch["labels"][..., None]).squeeze(-1)
        ce = ce - (picked * mask).sum()
        tokens += mask.sum()
    ((kd + ce_weight * ce) / tokens).backward()
    torch.testing.assert_close(sums[0], kd.detach(), rtol=1e-4, atol=0)
    assert sums[2] == tokens
    config = pair[0][0]
    hf_grads = {name: from_tensor(p.grad) for name, p in student.named_parameters()}
    want = to_megatron(family_of(config), config, hf_grads)
    for name, tensor in want.items():
        _close(got[name], tensor.read(), name)


def test_bf16_is_close_to_fp32(ranks, pair):
    """bf16 weights and activations, fp32 softmax, losses and gradient buffers."""
    want_sums, want = _run(ranks, pair, "single")
    sums, got = _run(ranks, pair, "single", precision="bf16-mixed")
    torch.testing.assert_close(sums, want_sums, rtol=2e-2, atol=0)
    for name, tensor in want.items():
        assert got[name].dtype == torch.float32
        # bf16 has 8 bits of mantissa and the errors add up over the layers.
        _close(got[name], tensor, name, tolerance=8e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(ranks, pair, layout):
    """Loss and every gradient tensor equal the single rank's, at an odd vocabulary of 101."""
    want_sums, want = _run(ranks, pair, "single")
    sums, got = _run(ranks, pair, layout)
    torch.testing.assert_close(sums, want_sums, rtol=1e-5, atol=1e-6)
    for name, tensor in want.items():
        _close(got[name], tensor, name)


def test_a_step_without_target_tokens_changes_nothing(ranks, tmp_path):
    """A step without target tokens leaves weights and Adam's moments as they are."""
    write_weights(tmp_path / "student", STUDENT, 1)
    write_weights(tmp_path / "teacher", TEACHER, 2)
    models = (STUDENT, str(tmp_path / "student")), (TEACHER, str(tmp_path / "teacher"))
    size, parallel = LAYOUTS["pp2"]
    for moved, losses in ranks.run(size, train_with_masked_step, *models, parallel, str(tmp_path)):
        assert moved[0] > 0
        assert moved[1] == 0
        assert moved[2] > 0
        assert losses[0] > 0
        assert losses[1] == 0
        assert losses[2] > 0

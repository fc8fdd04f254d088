"""Intermediate losses on any stage: gradients of every layout, of transformers, and a resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.checkpoint import FileSystemReader

from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.distillation import IntermediateConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.families.registry import family_of
from tests.cases.inter import inter_gradients, train, without_targets
from tests.cases.kd import batches
from tests.helpers.tiny import LLAMA, MIXTRAL, write_weights

TEACHER = replace(LLAMA, num_layers=8, hidden_size=48)
STUDENT = replace(
    LLAMA,
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
)
# Teacher states cross to earlier and to later stages; student layers 0, 2 and 3 are on the first, a
# middle and the last stage of PP4.
MAP = [[5, 0], [1, 3], [4, 2]]
ALL = IntermediateConfig(
    losses=["embedding", "attention_relation", "mlp_input", "block_output"], layer_map=MAP
)
MSE = IntermediateConfig(
    losses=["embedding", "block_output"], layer_map=MAP, metric="mse", alpha="0.7"
)
SP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "TP2": (2, {"tensor_model_parallel_size": 2}),
    "TP2 SP": (2, SP),
    "PP2": (2, {"pipeline_model_parallel_size": 2}),
    "PP2 uneven": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
    ),
    "PP2 VPP2": (
        2,
        {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    ),
    "PP2 custom": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": "Et*3|tL",
            "teacher": {"pipeline_model_parallel_layout": "Et*2|t*6L"},
        },
    ),
    "CP2": (2, {"context_parallel_size": 2}),
    "DP2": (2, {}),
    "TP2 SP PP2": (4, {**SP, "pipeline_model_parallel_size": 2}),
    "PP4": (4, {"pipeline_model_parallel_size": 4}),
    "PP2 DP2": (4, {"pipeline_model_parallel_size": 2}),
}


def _error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


class Pair:
    """Student and teacher on disk and the gradients of one rank."""

    def __init__(self, ranks, folder: Path, student, teacher) -> None:
        self.ranks, self.folder = ranks, folder
        self.student = (student, str(folder / "student"))
        self.teacher = (teacher, str(folder / "teacher"))
        write_weights(folder / "student", student, 1)
        write_weights(folder / "teacher", teacher, 2)
        self._alone: dict[str, tuple] = {}

    def gradients(self, size: int, parallel: dict, intermediate, **over):
        """Return the log and every gradient of a step, equal on all ranks and copies."""
        out = self.folder / f"{len(list(self.folder.iterdir()))}"
        split = {"teacher_parallel": parallel.get("teacher", {})}
        over = {"intermediate": intermediate, **split, **over}
        config = ParallelConfig(**{k: v for k, v in parallel.items() if k != "teacher"})
        results = self.ranks.run(
            size, inter_gradients, self.student, self.teacher, config, str(out), over
        )
        assert all(r["losses"] == results[0]["losses"] for r in results), "ranks disagree"
        copies = [grad for r in results for _, grad in r["copies"]]
        assert all(torch.equal(grad, copies[0]) for grad in copies), "copies drift apart"
        keys = FileSystemReader(str(out)).read_metadata().state_dict_metadata
        assert not any("projection" in key for key in keys), "no part of the result"
        store = read_torch_dist(out, family_of(self.student[0]), self.student[0])
        grads = {name: tensor.read() for name, tensor in store.items()}
        return results[0]["losses"], {**grads, "projection": copies[0]}

    def alone(self, intermediate):
        """Return the log and every gradient of a step on one rank."""
        key = repr(intermediate)
        if key not in self._alone:
            self._alone[key] = self.gradients(1, {}, intermediate)
        return self._alone[key]


@pytest.fixture(scope="module")
def pair(ranks, tmp_path_factory) -> Pair:
    return Pair(ranks, tmp_path_factory.mktemp("inter"), STUDENT, TEACHER)


@pytest.fixture(scope="module")
def moe(ranks, tmp_path_factory) -> Pair:
    teacher = replace(MIXTRAL, num_layers=4)
    student = replace(
        MIXTRAL, num_layers=3, hidden_size=48, num_moe_experts=2, moe_ffn_hidden_size=24
    )
    return Pair(ranks, tmp_path_factory.mktemp("inter_moe"), student, teacher)


def _same(got, want, table, name: str, size: int, losses: str) -> None:
    errors = {key: _error(got[1][key], tensor) for key, tensor in want[1].items()}
    worst = max(errors, key=lambda key: errors[key])
    table.record(
        f"test_intermediate.py::{name}",
        ranks=size,
        layout=name.split("[")[1].rstrip("]") + (", 2 experts" if "moe" in name else ""),
        losses=losses,
        error=errors[worst],
    )
    for key, value in want[0].items():
        assert got[0][key] == pytest.approx(value, rel=1e-5), key
    assert errors[worst] < 1e-4, (worst, errors[worst])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_do_not_depend_on_the_layout(pair, gradient_table, layout):
    """All four losses, cosine, dynamic alpha."""
    size, parallel = LAYOUTS[layout]
    got = pair.gradients(size, parallel, ALL)
    name = f"test_gradients_do_not_depend_on_the_layout[{layout}]"
    _same(got, pair.alone(ALL), gradient_table, name, size, "all four (cosine)")


def test_mean_squared_error(pair, gradient_table):
    """And a constant alpha."""
    size, parallel = LAYOUTS["TP2 SP PP2"]
    got = pair.gradients(size, parallel, MSE)
    name = "test_mean_squared_error[TP2 SP PP2]"
    _same(got, pair.alone(MSE), gradient_table, name, size, "embedding, block output (mse)")


@pytest.mark.parametrize(
    ("layout", "size", "parallel"),
    [("EP2", 2, {"expert_model_parallel_size": 2}), ("TP2 SP", 2, SP)],
    ids=["EP2", "TP2 SP"],
)
def test_moe_gradients(moe, gradient_table, layout, size, parallel):
    losses = replace(ALL, layer_map=None)
    got = moe.gradients(size, parallel, losses)
    name = f"test_moe_gradients[{layout}]"
    _same(got, moe.alone(losses), gradient_table, name, size, "all four (cosine)")


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective"},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ],
    ids=["selective", "full"],
)
def test_activation_recompute_changes_nothing(pair, recompute):
    size, parallel = LAYOUTS["PP2 VPP2"]
    losses, grads = pair.gradients(size, parallel, ALL, recompute=recompute)
    want = pair.alone(ALL)
    assert losses == pytest.approx(want[0], rel=1e-5)
    for name, tensor in want[1].items():
        assert _error(grads[name], tensor) < 1e-4, name


def test_bf16_is_close_to_fp32(pair):
    """Half-precision states cross the pipeline as they are; the losses are made in fp32."""
    size, parallel = LAYOUTS["PP2"]
    losses, grads = pair.gradients(size, parallel, MSE, precision="bf16-mixed")
    want = pair.alone(MSE)
    assert losses == pytest.approx(want[0], rel=2e-2)
    assert grads["projection"].dtype == torch.float32
    assert _error(grads["projection"], want[1]["projection"]) < 8e-2


def test_no_target_tokens_change_nothing(pair):
    """Also as the very first batch, when there is no alpha yet."""
    args = (pair.student, pair.teacher, ParallelConfig(), {"intermediate": ALL})
    (logged, norm), (alpha, before) = pair.ranks.run(1, without_targets, *args)[0]
    assert set(logged.values()) == {0.0}
    assert norm == 0.0
    assert alpha == before > 0


def _hf_model(member, folder: Path):
    from transformers import AutoModelForCausalLM

    from nemo_minitron.checkpoint.hf import to_hf, write_hf

    config, path = member
    family = family_of(config)
    target = folder / f"hf-{Path(path).name}"
    target.mkdir(exist_ok=True)
    store = read_torch_dist(Path(path), family, config)
    write_hf(target, to_hf(family, config, store), family.to_hf(config), "5GB")
    return AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)


def _read(model, states, place: int) -> torch.Tensor:
    """State at a place, as its reader's norm leaves it (transformers norms the last one itself)."""
    if place == len(model.model.layers):
        return states[place]
    return model.model.layers[place].input_layernorm(states[place])


@pytest.mark.parametrize("losses", [MSE, replace(MSE, metric="cosine", alpha="dynamic")])
def test_one_rank_equals_transformers(pair, losses):
    """Losses and gradients of a plain computation from ``output_hidden_states``."""
    from nemo_minitron.checkpoint.hf import to_megatron
    from nemo_minitron.checkpoint.lazy import from_tensor
    from nemo_minitron.models.projection import Projection

    logged, got = pair.alone(losses)
    student, teacher = _hf_model(pair.student, pair.folder), _hf_model(pair.teacher, pair.folder)
    projection = Projection(32, 48, copy=0, sequence_parallel=False)
    places = [(0, 0), *((t + 1, s + 1) for t, s in sorted(MAP))]
    kd, tokens, *inner = (torch.zeros(()) for _ in range(2 + len(places)))
    for batch in batches(4, 16, STUDENT.vocab_size):
        out = student(batch["tokens"], output_hidden_states=True)
        with torch.no_grad():
            target = teacher(batch["tokens"], output_hidden_states=True)
            wanted = [_read(teacher, target.hidden_states, place) for place, _ in places]
        mask, log_t = batch["loss_mask"], target.logits.log_softmax(-1)
        kd += ((log_t.exp() * (log_t - out.logits.log_softmax(-1))).sum(-1) * mask).sum()
        for index, (_, place) in enumerate(places):
            mine = projection(_read(student, out.hidden_states, place))
            if losses.metric == "mse":
                distance = F.mse_loss(mine, wanted[index], reduction="none").mean(-1)
            else:
                distance = 1 - F.cosine_similarity(mine, wanted[index], dim=-1)
            inner[index] = inner[index] + (distance * mask).sum()
        tokens += mask.sum()
    alpha = (kd / torch.stack(inner).sum()).item() if losses.dynamic else 0.7
    total = (kd + alpha * torch.stack(inner).sum()) / tokens
    total.backward()
    assert logged["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert logged["alpha"] == pytest.approx(alpha, rel=1e-5)
    names = [name for name in logged if name.startswith("intermediate/")]
    assert len(names) == len(places)
    for value in inner:
        assert any(logged[n] == pytest.approx((value / tokens).item(), rel=1e-5) for n in names)
    want = to_megatron(
        family_of(STUDENT), STUDENT, {n: from_tensor(p.grad) for n, p in student.named_parameters()}
    )
    grads = {name: tensor.read() for name, tensor in want.items()}
    assert projection.weight.grad is not None
    for name, tensor in {**grads, "projection": projection.weight.grad}.items():
        assert _error(got[name], tensor) < 1e-4, name


def _train(pair, size, parallel, folder, save_after, steps=4, losses=ALL, sharded=True):
    over = {"intermediate": losses, "sharded": sharded}
    args = (pair.student, pair.teacher, ParallelConfig(**parallel), over)
    return pair.ranks.run(size, train, *args, str(folder), save_after, steps)


@pytest.mark.parametrize("layout", ["PP2 VPP2", "PP2 DP2"])
def test_resume_goes_on_bit_for_bit(pair, tmp_path, layout):
    """Dynamic alpha, projection and its optimizer state come back; copies stay equal."""
    size, parallel = LAYOUTS[layout]
    whole = _train(pair, size, parallel, tmp_path / "saved", 2)
    resumed = _train(pair, size, parallel, tmp_path / "saved", 0)
    alone = _train(pair, 1, {}, tmp_path / "alone", 9)
    for rank, records in enumerate(whole):
        for got, want in zip(resumed[rank], records[2:], strict=True):
            copies = (got.pop("copies"), want.pop("copies"))
            assert got == want
            assert all(torch.equal(a, b) for a, b in zip(*copies, strict=True))
            assert all(torch.equal(copies[0][0], copy) for copy in copies[0])
        for got, want in zip(records, alone[0], strict=True):
            assert got["norm"] == pytest.approx(want["norm"], rel=1e-4)
            assert got["loss"] == pytest.approx(want["loss"], rel=1e-4)
            assert got["alpha"] == pytest.approx(want["alpha"], rel=1e-4)
    alphas = [record["alpha"] for record in whole[0]]
    assert len(set(alphas)) > 2, "alpha follows the losses"


def test_a_checkpoint_without_projection_is_refused(pair, tmp_path):
    _train(pair, 1, {}, tmp_path / "plain", 1, steps=1, losses=IntermediateConfig())
    with pytest.raises(RuntimeError, match=r"has no kd_projection.weight.*overwrite=true"):
        _train(pair, 1, {}, tmp_path / "plain", 0)

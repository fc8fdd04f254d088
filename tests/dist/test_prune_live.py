"""One answer on every layout: scores, kept indices and pruned weights.

Every layout scores the same model, prunes it in memory by width, depth and both, and saves it; the
answer to equal is one rank's scores and the streaming executor's weights.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.importance.scores import Scores, model_meta
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from nemo_minitron.pruning.slicing import prune_store
from tests.dist.live_cases import (
    Result,
    exchange_rows,
    gradients_after_pruning,
    logits_at,
    refused,
    refused_scoring,
    score_and_prune,
)
from tests.layout_table import LayoutTable, read_rows
from tests.pool import WorkerPool
from tests.tiny import LLAMA, random_weights, token_batch, write_weights

MODEL = replace(LLAMA, num_layers=8, num_attention_heads=16, num_query_groups=8)
FAMILY = family_of(MODEL)
SAMPLES, LENGTH = 4, 16
pytestmark = pytest.mark.timeout(300)  # eight ranks start on two cores
WIDTH = TargetConfig(hidden_size=40, ffn_hidden_size=64, num_attention_heads=8, num_query_groups=4)


def layout(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    dp: int = 1,
    sp: bool = False,
    first: int | None = None,
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        sequence_parallel=sp,
        num_layers_in_first_pipeline_stage=first,
    )


LAYOUTS = {
    "TP1": layout(),
    "TP2": layout(tp=2),
    "TP2 SP": layout(tp=2, sp=True),
    "TP4": layout(tp=4),
    "TP4 SP": layout(tp=4, sp=True),
    "PP2": layout(pp=2),
    "PP2 uneven": layout(pp=2, first=3),
    "PP4": layout(pp=4),
    "PP2 VPP2": layout(pp=2, vpp=2),
    "CP2": layout(cp=2),
    "DP2": layout(dp=2),
    "TP2 PP2": layout(tp=2, pp=2),
    "TP2 SP PP2 VPP2": layout(tp=2, sp=True, pp=2, vpp=2),
    "TP2 SP CP2": layout(tp=2, sp=True, cp=2),
    "PP2 CP2": layout(pp=2, cp=2),
    "PP2 VPP2 DP2": layout(pp=2, vpp=2, dp=2),
    "TP2 SP PP4": layout(tp=2, sp=True, pp=4),
    "TP4 PP2": layout(tp=4, pp=2),
    "TP2 SP PP2 CP2": layout(tp=2, sp=True, pp=2, cp=2),
    "TP2 PP2 DP2": layout(tp=2, pp=2, dp=2),
}


def prunings(parallel: ParallelConfig) -> dict[str, PruningConfig]:
    """Width, depth and both; interleaving wants a multiple of stages x chunks."""
    depth, both = (4, 4) if parallel.virtual_pipeline_model_parallel_size else (5, 6)
    return {
        "width": PruningConfig(target=WIDTH),
        "depth": PruningConfig(target=TargetConfig(num_layers=depth)),
        "both": PruningConfig(target=replace(WIDTH, num_layers=both)),
    }


# ---------------------------------------------------------------- the answer: one rank, streaming


@dataclass
class Truth:
    """Checkpoint, tokens and one rank's scores; plans and streamed weights on demand."""

    config: ModelConfig
    folder: Path
    ids: torch.Tensor
    scores: Scores

    def plan(self, pruning: PruningConfig) -> Plan:
        return make_plan(self.config, pruning, self.scores)

    def weights(self, plan: Plan) -> dict[str, torch.Tensor]:
        store = read_torch_dist(self.folder, FAMILY, self.config)
        pruned = prune_store(FAMILY, self.config, plan, store)
        return {name: tensor.read() for name, tensor in pruned.items()}


def _truth(ranks: WorkerPool, folder: Path, config: ModelConfig) -> Truth:
    ids = token_batch(SAMPLES, LENGTH, config.vocab_size)[:, :LENGTH].contiguous()
    write_weights(folder / "model", config, seed=0)
    arguments = (config, str(folder / "model"), ids, layout(), {}, "")
    (result,) = ranks.run(1, score_and_prune, *arguments)
    scores = Scores(**result["scores"], meta={"model": model_meta(config)})
    return Truth(config, folder / "model", ids, scores)


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    return _truth(ranks, tmp_path_factory.mktemp("live"), MODEL)


@pytest.fixture(scope="module")
def logits(ranks: WorkerPool, truth: Truth, tmp_path_factory):
    """Logits of the streamed weights on one rank, each plan's once."""
    from nemo_minitron.checkpoint.torch_dist import write_torch_dist

    found: list[tuple[Plan, torch.Tensor]] = []

    def of(plan: Plan) -> torch.Tensor:
        for known, tensor in found:
            if known == plan:
                return tensor
        folder, small = tmp_path_factory.mktemp("streamed"), pruned_config(MODEL, plan)
        store = {name: from_tensor(t) for name, t in truth.weights(plan).items()}
        write_torch_dist(folder, store, FAMILY, small, workers=1)
        (tensor,) = ranks.run(1, logits_at, small, str(folder), truth.ids, layout())
        found.append((plan, tensor))
        return tensor

    return of


# ---------------------------------------------------------------- who owns what, written by hand


def shard(name: str, tensor: torch.Tensor, tp: int) -> list[torch.Tensor | None]:
    """Megatron's split of a layer's tensor over tensor-parallel ranks; None: held by all."""
    if "layernorm" in name:
        return [None] * tp
    if "linear_fc1" in name:
        gate, up = tensor.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(tp), up.chunk(tp), strict=True)]
    return list(tensor.chunk(tp, dim=0 if "linear_qkv" in name else 1))


def owners(name: str, shape: torch.Size, tp: int) -> torch.Tensor:
    """Tensor-parallel rank of every element of a layer's tensor."""
    numbers = torch.arange(shape.numel()).view(shape)
    result = torch.zeros(shape.numel())
    for rank, part in enumerate(shard(name, numbers, tp)):
        if part is not None:
            result[part.flatten()] = rank
    return result.view(shape)


def stage_of_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Pipeline stage of every layer."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if vpp:
        return [layer * pp * vpp // num_layers % pp for layer in range(num_layers)]
    first, last = (
        parallel.num_layers_in_first_pipeline_stage,
        parallel.num_layers_in_last_pipeline_stage,
    )
    middle = pp - (first is not None) - (last is not None)
    each = (num_layers - (first or 0) - (last or 0)) // middle if middle else 0
    sizes = [each] * pp
    sizes[0] = sizes[0] if first is None else first
    sizes[-1] = sizes[-1] if last is None else last
    return [stage for stage, size in enumerate(sizes) for _ in range(size)]


def moved_bytes(truth: Truth, plan: Plan, parallel: ParallelConfig) -> int:
    """Bytes of the elements whose rank changes, in one replica."""
    tp = parallel.tensor_model_parallel_size
    small = pruned_config(truth.config, plan)
    before = stage_of_layers(truth.config.num_layers, parallel)
    after = stage_of_layers(small.num_layers, balanced_layout(truth.config, small, parallel))
    # Every element says who owns it; pruning then shows whose the kept ones are.
    store = {
        name: from_tensor(owners(name, torch.Size(row.shape(truth.config)), tp))
        for name, row, _ in FAMILY.parameters(truth.config)
    }
    count = 0
    for name, tensor in prune_store(FAMILY, truth.config, plan, store).items():
        if not name.startswith("decoder.layers."):
            continue
        position = int(name.split(".")[2])
        old = tensor.read()
        changed = old != owners(name, old.shape, tp)
        if before[plan.layers[position]] != after[position]:
            changed[:] = True
        held_by = tp if "layernorm" in name else 1
        count += int(changed.sum()) * held_by
    return 4 * count


# ---------------------------------------------------------------- tests


def score_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    errors = [(found[axis] / expected[axis] - 1).abs().max() for axis in expected]
    return float(max(errors))


def saved_weights(folder: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    store = read_torch_dist(folder, FAMILY, config)
    return {name: tensor.read() for name, tensor in store.items()}


def equal_weights(truth: Truth, plan: Plan, folder: Path) -> bool:
    expected = truth.weights(plan)
    found = saved_weights(folder, pruned_config(truth.config, plan))
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], tensor) for name, tensor in expected.items()
    )


def check_balance(results: list[Result], kind: str, plan: Plan) -> None:
    """Equal shards on the ranks of a stage; stages that differ by at most one layer."""
    shapes: dict[int, list[dict[str, torch.Size]]] = {}
    layers: dict[int, list[list[int]]] = {}
    for result in results:
        stage, _ = result["place"]
        shapes.setdefault(stage, []).append(result[kind]["shapes"])
        layers[stage] = result[kind]["layers"]
    for found in shapes.values():
        assert all(other == found[0] for other in found)
    counts = [sum(map(len, chunks)) for chunks in layers.values()]
    assert sum(counts) == len(plan.layers)
    if len(plan.layers) < MODEL.num_layers:
        assert max(counts) - min(counts) <= 1


def check_memory(result: Result) -> None:
    """The old layers are gone, and there was never more than one layer extra."""
    assert result["bytes_left"] == 0
    assert result["bytes_after"] == result["bytes_weights"]
    assert result["bytes_peak"] <= result["bytes_before"] + result["bytes_layer"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_one_answer(
    ranks: WorkerPool, truth: Truth, logits, layout_table: LayoutTable, tmp_path, name: str
) -> None:
    parallel = LAYOUTS[name]
    ways, world = prunings(parallel), parallel.world_size()
    replicas = parallel.context_parallel_size * (parallel.data_parallel_size or 1)
    arguments = (MODEL, str(truth.folder), truth.ids, parallel, ways, str(tmp_path))
    results = ranks.run(world, score_and_prune, *arguments)
    plans = {kind: truth.plan(pruning) for kind, pruning in ways.items()}
    error = score_error(results[0]["scores"], truth.scores.axes())
    same_indices = all(r[kind]["plan"] == plans[kind] for r in results for kind in ways)
    same_weights = all(equal_weights(truth, plans[kind], tmp_path / kind) for kind in ways)
    layout_table.record(
        f"test_prune_live.py::test_one_answer[{name}]",
        ranks=world,
        layout=name,
        score_error=error,
        same_indices=same_indices,
        same_weights=same_weights,
    )
    assert error < 1e-5
    assert same_indices
    assert same_weights
    for kind, plan in plans.items():
        check_balance(results, kind, plan)
        sent = sum(result[kind]["bytes"] for result in results)
        assert sent == moved_bytes(truth, plan, parallel) * replicas
        for result in results:
            check_memory(result[kind])
            if result[kind]["logits"] is not None:
                close_logits(result[kind]["logits"], logits(plan))


def close_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Up to the order of sums; padding of the vocabulary left out."""
    v = MODEL.vocab_size
    torch.testing.assert_close(found[..., :v], expected[..., :v], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["TP2 PP2", "PP2 VPP2"])
def test_tied_embeddings(ranks: WorkerPool, tmp_path, name: str) -> None:
    """The last stage holds a copy of the embeddings, which is pruned too."""
    parallel = LAYOUTS[name]
    truth = _truth(ranks, tmp_path, replace(MODEL, share_embeddings_and_output_weights=True))
    ways = {"both": prunings(parallel)["both"]}
    arguments = (truth.config, str(truth.folder), truth.ids, parallel, ways, str(tmp_path / "out"))
    results = ranks.run(parallel.world_size(), score_and_prune, *arguments)
    plan = truth.plan(ways["both"])
    assert equal_weights(truth, plan, tmp_path / "out" / "both")
    small = pruned_config(truth.config, plan)
    (expected,) = ranks.run(
        1, logits_at, small, str(tmp_path / "out" / "both"), truth.ids, layout()
    )
    found = [r["both"]["logits"] for r in results if r["both"]["logits"] is not None]
    for tensor in found:
        close_logits(tensor, expected)


@pytest.mark.parametrize("other", ["TP1", "TP4", "TP2 SP CP2", "PP2 VPP2"])
def test_loads_at_another_layout(
    ranks: WorkerPool, truth: Truth, logits, tmp_path_factory, other: str
) -> None:
    """What TP2 PP2 pruned gives the same logits elsewhere."""
    parallel = LAYOUTS["TP2 PP2"]
    ways = {"both": PruningConfig(target=replace(WIDTH, num_layers=4))}
    out = tmp_path_factory.getbasetemp() / "pruned at TP2 PP2"
    if not out.exists():
        arguments = (MODEL, str(truth.folder), truth.ids, parallel, ways, str(out))
        ranks.run(parallel.world_size(), score_and_prune, *arguments)
    plan = truth.plan(ways["both"])
    small, elsewhere = pruned_config(MODEL, plan), LAYOUTS[other]
    found = ranks.run(
        elsewhere.world_size(), logits_at, small, str(out / "both"), truth.ids, elsewhere
    )
    seen = [tensor for tensor in found if tensor is not None]
    assert seen
    for tensor in seen:
        close_logits(tensor, logits(plan))


@pytest.mark.parametrize("name", ["TP2", "PP2"])
def test_a_pruned_model_trains(ranks: WorkerPool, truth: Truth, name: str) -> None:
    parallel = LAYOUTS[name]
    plan = truth.plan(prunings(parallel)["both"])
    arguments = (MODEL, str(truth.folder), truth.ids, parallel, plan)
    ranks.run(parallel.world_size(), gradients_after_pruning, *arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_rows_of_any_dtype_travel(ranks: WorkerPool, dtype: torch.dtype) -> None:
    ranks.run(2, exchange_rows, dtype)


def test_refusals_leave_the_model_alone(ranks: WorkerPool, truth: Truth) -> None:
    plan = full_plan(MODEL)
    five = replace(
        plan,
        layers=[0, 1, 2, 4, 6],
        ffn=plan.ffn[:5],
        head=plan.head[:5],
        query_group=plan.query_group[:5],
    )
    odd = replace(plan, ffn=[list(range(51))] * MODEL.num_layers)
    for parallel, chosen, message in (
        (LAYOUTS["PP2 VPP2"], five, "keep 4 or 8 layers"),
        (LAYOUTS["TP2"], odd, "pruning.target.ffn_hidden_size to 50 or 52"),
    ):
        for said, untouched in ranks.run(2, refused, MODEL, str(truth.folder), parallel, chosen):
            assert message in said
            assert untouched


def test_interleaving_needs_enough_micro_batches(ranks: WorkerPool, truth: Truth) -> None:
    arguments = (MODEL, str(truth.folder), truth.ids, LAYOUTS["PP2 VPP2"], 1)
    for said in ranks.run(2, refused_scoring, *arguments):
        assert "set data.global_batch_size to a multiple of 2" in said


def test_the_documented_table_is_complete() -> None:
    rows = read_rows()
    for name in LAYOUTS:
        row = rows[f"test_prune_live.py::test_one_answer[{name}]"]
        _, _, _, error, same_indices, same_weights, *_ = (cell.strip() for cell in row.split("|"))
        assert float(error) <= 1e-5
        assert (same_indices, same_weights) == ("yes", "yes")


def test_random_weights_have_no_equal_rows() -> None:
    """Or a row in the wrong place would go unseen."""
    for tensor in random_weights(MODEL).values():
        assert len(tensor.unique(dim=0)) == len(tensor)

"""Results of one rank and of streaming, and checks that must hold at every layout."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from nemo_minitron.checkpoint.lazy import from_tensor
from nemo_minitron.checkpoint.torch_dist import read_torch_dist, write_torch_dist
from nemo_minitron.config.balance import balanced_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import PruningConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.pruning.plan import Plan, make_plan, pruned_config
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.pruning.slicing import prune_store
from tests.cases.live import Result, logits_at, score_and_prune
from tests.helpers.layout_table import LayoutTable
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import token_batch, write_weights

SAMPLES, LENGTH = 4, 16
_ROUNDING = 1e-4  # of the logits of a tiny model


def layout(
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    dp: int = 1,
    ep: int = 1,
    sp: bool = False,
    first: int | None = None,
    custom: str | None = None,
) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        context_parallel_size=cp,
        data_parallel_size=dp,
        expert_model_parallel_size=ep,
        sequence_parallel=sp,
        num_layers_in_first_pipeline_stage=first,
        pipeline_model_parallel_layout=custom,
    )


# ---------------------------------------------------------------- the answer: one rank, streaming


@dataclass
class Truth:
    """Checkpoint, tokens and one rank's scores; plans, weights and logits on demand."""

    ranks: WorkerPool
    config: ModelConfig
    folder: Path
    ids: torch.Tensor
    scores: Scores
    rounds: bool = False
    """Whether logits are so large that their rounding error must be measured: a real model."""
    _logits: list[tuple[Plan, torch.Tensor]] = field(default_factory=list)

    def plan(self, pruning: PruningConfig) -> Plan:
        return make_plan(self.config, pruning, self.scores)

    def weights(self, plan: Plan) -> dict[str, torch.Tensor]:
        family = family_of(self.config)
        store = read_torch_dist(self.folder, family, self.config)
        pruned = prune_store(family, self.config, plan, store)
        return {name: tensor.read() for name, tensor in pruned.items()}

    def logits(self, plan: Plan) -> torch.Tensor:
        """Return the logits of the streamed weights on one rank."""
        for known, tensor in self._logits:
            if known == plan:
                return tensor
        folder = self.folder.parent / f"streamed{len(self._logits)}"
        folder.mkdir()
        small = pruned_config(self.config, plan)
        store = {name: from_tensor(tensor) for name, tensor in self.weights(plan).items()}
        write_torch_dist(folder, store, family_of(small), small, workers=1)
        (tensor,) = self.ranks.run(1, logits_at, small, str(folder), self.ids, layout())
        self._logits.append((plan, tensor))
        return tensor

    def rounding(self, plan: Plan) -> float:
        """Largest error that logits may have for the order of their sums.

        For a real model that is how far one rank's fp32 answer is from the same in fp64 (1e-3 for
        SmolLM2-135M, whose logits reach 32); sums over several ranks are rounded no better.
        """
        if not self.rounds:
            return _ROUNDING
        expected, v = self.logits(plan), self.config.vocab_size
        index = [known for known, _ in self._logits].index(plan)
        folder = str(self.folder.parent / f"streamed{index}")
        small = pruned_config(self.config, plan)
        (exact,) = self.ranks.run(1, logits_at, small, folder, self.ids, layout(), True)
        error = float((exact[..., :v] - expected[..., :v]).abs().max())
        return max(error, _ROUNDING)


def make_truth(ranks: WorkerPool, folder: Path, config: ModelConfig) -> Truth:
    """A random model in ``folder``."""
    ids = token_batch(SAMPLES, LENGTH, config.vocab_size)[:, :LENGTH].contiguous()
    write_weights(folder / "model", config, seed=0)
    return score_alone(ranks, folder / "model", config, ids)


def score_alone(ranks: WorkerPool, folder: Path, config: ModelConfig, ids: torch.Tensor) -> Truth:
    (result,) = ranks.run(1, score_and_prune, config, str(folder), ids, layout(), {}, "")
    scores = Scores(**result["scores"], meta={"model": model_meta(config)})
    return Truth(ranks, config, folder, ids, scores)


# ---------------------------------------------------------------- who owns what, written by hand


def replicated(name: str) -> bool:
    """Whether all tensor-parallel ranks hold the whole tensor."""
    norm = "norm.weight" in name and "mixer.norm" not in name
    added_once = name.endswith(("linear_proj.bias", "linear_fc2.bias"))
    return norm or added_once or "router" in name or "gate_weight" in name


def split_one_by_one(name: str, rows: int, config: ModelConfig) -> list[int]:
    """Sizes of the blocks of rows of which every tensor-parallel rank has a share."""
    if "linear_fc1" in name and config.gated_linear_unit:
        return [rows // 2] * 2
    if config.linear_attention_freq is not None:
        keys, values = config.linear_num_key_heads or 0, config.linear_num_value_heads or 0
        key = keys * (config.linear_key_head_dim or 0)
        value = values * (config.linear_value_head_dim or 0)
        convolved = [key, key, value]
        whole = [*convolved, value, values, values]
        return convolved if "conv1d" in name else whole if "in_proj" in name else []
    heads = config.mamba_num_heads or 0
    x = heads * (config.mamba_head_dim or 0)
    b = (config.mamba_num_groups or 0) * (config.mamba_state_dim or 0)
    if "conv1d" in name:
        return [x, b, b]
    return [x, x, b, b, heads] if "in_proj" in name else []


def owners(name: str, shape: torch.Size, config: ModelConfig, parallel: ParallelConfig):
    """Rank of every element of a layer's tensor: expert-parallel x tensor-parallel."""
    tp = parallel.tensor_model_parallel_size
    numbers = torch.arange(shape.numel()).view(shape)
    parts = [numbers]
    blocks = split_one_by_one(name, shape[0], config)
    if blocks:
        shares = [block.chunk(tp) for block in numbers.split(blocks)]
        parts = [torch.cat(pieces) for pieces in zip(*shares, strict=True)]
    elif not replicated(name):
        columns = any(end in name for end in ("linear_proj", "linear_fc2", "out_proj"))
        parts = list(numbers.chunk(tp, dim=int(columns)))
    result = torch.zeros(shape.numel())
    for rank, part in enumerate(parts):
        result[part.flatten()] = rank
    if ".local_experts." in name:
        expert = int(name.split(".local_experts.")[1].split(".")[0])
        assert config.num_moe_experts is not None
        result += tp * (expert * parallel.expert_model_parallel_size // config.num_moe_experts)
    return result.view(shape)


def stage_of_layers(num_layers: int, parallel: ParallelConfig) -> list[int]:
    """Pipeline stage of every layer."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    if parallel.pipeline_model_parallel_layout:  # nothing is repeated in it
        parts = parallel.pipeline_model_parallel_layout.split("|")
        return [i % pp for i, part in enumerate(parts) for _ in range(part.count("t"))]
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


def moved_bytes(config: ModelConfig, plan: Plan, parallel: ParallelConfig) -> int:
    """Bytes of the elements whose rank changes, over all ranks."""
    family, small = family_of(config), pruned_config(config, plan)
    before = stage_of_layers(config.num_layers, parallel)
    after = stage_of_layers(small.num_layers, balanced_layout(config, small, parallel))
    copies = parallel.context_parallel_size * (parallel.data_parallel_size or 1)
    # Every element says who owns it; pruning then shows whose the kept ones are.
    store = {
        name: from_tensor(owners(name, torch.Size(row.shape(config)), config, parallel))
        for name, row, _ in family.parameters(config)
    }
    count = 0
    for name, tensor in prune_store(family, config, plan, store).items():
        if not name.startswith("decoder.layers."):
            continue
        position = int(name.split(".")[2])
        old = tensor.read()
        changed = old != owners(name, old.shape, small, parallel)
        if before[plan.layers[position]] != after[position]:
            changed[:] = True
        held_by = copies * (parallel.tensor_model_parallel_size if replicated(name) else 1)
        if ".local_experts." in name:
            held_by //= parallel.expert_model_parallel_size
        count += int(changed.sum()) * held_by
    return 4 * count


# ---------------------------------------------------------------- checks


def score_error(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative error over all axes."""
    assert found.keys() == expected.keys()
    errors = [
        ((found[axis] - want).abs() / want.abs().clamp_min(1e-30)).max()
        for axis, want in expected.items()
    ]
    return float(max(errors))


def equal_weights(truth: Truth, plan: Plan, folder: Path) -> bool:
    """Whether the checkpoint in ``folder`` is that of the streaming executor."""
    expected, small = truth.weights(plan), pruned_config(truth.config, plan)
    found = read_torch_dist(folder, family_of(small), small)
    return found.keys() == expected.keys() and all(
        torch.equal(found[name].read(), tensor) for name, tensor in expected.items()
    )


def close_logits(
    found: torch.Tensor, expected: torch.Tensor, config: ModelConfig, atol: float = _ROUNDING
) -> None:
    """Up to the order of sums; padding of the vocabulary left out."""
    v = config.vocab_size
    torch.testing.assert_close(found[..., :v], expected[..., :v], rtol=1e-4, atol=atol)


def check_balance(results: list[Result], kind: str, dropped: bool) -> None:
    """Equal shards on the ranks of a stage; if layers were dropped, stages as long to one layer."""
    shapes: dict[int, list[dict[str, torch.Size]]] = {}
    layers: dict[int, list[list[int]]] = {}
    for result in results:
        stage, _ = result["place"]
        shapes.setdefault(stage, []).append(result[kind]["shapes"])
        layers[stage] = result[kind]["layers"]
    for found in shapes.values():
        assert all(other == found[0] for other in found)
    counts = [sum(map(len, chunks)) for chunks in layers.values()]
    if dropped:
        assert max(counts) - min(counts) <= 1


def check_memory(result: Result) -> None:
    """The old layers are gone, and there was never more than one layer extra."""
    assert result["bytes_left"] == 0
    assert result["bytes_after"] == result["bytes_weights"]
    assert result["bytes_peak"] <= result["bytes_before"] + result["bytes_layer"]


def one_answer(
    truth: Truth,
    parallel: ParallelConfig,
    ways: dict[str, PruningConfig],
    out: Path,
    table: LayoutTable,
    test: str,
    name: str,
) -> None:
    """Score, plan, prune in memory and save at a layout; record it and check everything."""
    config, world = truth.config, parallel.world_size()
    arguments = (config, str(truth.folder), truth.ids, parallel, ways, str(out))
    results = truth.ranks.run(world, score_and_prune, *arguments)
    plans = {kind: truth.plan(pruning) for kind, pruning in ways.items()}
    error = score_error(results[0]["scores"], truth.scores)
    same_indices = all(r[kind]["plan"] == plans[kind] for r in results for kind in ways)
    same_weights = all(equal_weights(truth, plans[kind], out / kind) for kind in ways)
    table.record(
        test,
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
        # Stages of hybrid models are balanced by cost: tests/unit/test_balance.py.
        by_number = config.hybrid_layer_pattern is None
        check_balance(results, kind, dropped=by_number and len(plan.layers) < config.num_layers)
        atol = truth.rounding(plan)
        sent = sum(result[kind]["bytes"] for result in results)
        assert sent == moved_bytes(config, plan, parallel)
        for result in results:
            check_memory(result[kind])
            if result[kind]["logits"] is not None:
                close_logits(result[kind]["logits"], truth.logits(plan), config, atol)

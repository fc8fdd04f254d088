"""The layout a model gets when it is pruned in memory. Imports neither torch nor Megatron.

The degrees stay; only the split of the layers over the pipeline changes. Megatron splits evenly, or
with a first and a last stage of their own size: not every number of layers can be spread so that
stages differ by at most one layer. A hybrid model, whose layers differ, can be split anywhere:
there the stage that computes most computes as little as possible.
"""

from dataclasses import replace

from nemo_minitron.config.axes import split_sizes
from nemo_minitron.config.layers import ATTENTION, EXPERTS, MLP
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig


def balanced_layout(
    config: ModelConfig, pruned: ModelConfig, parallel: ParallelConfig
) -> ParallelConfig:
    """Return the layout of the pruned model on the ranks of the model before pruning.

    Args:
        config: the model before pruning.
        pruned: the model after pruning.
        parallel: layout of the model before pruning.

    Returns:
        ``parallel`` itself when no layer is dropped (an uneven split stays as the user set it),
        else with stages that differ by at most one layer, or of a hybrid model by cost.

    Raises:
        ValueError: a size does not split over the ranks that share it, or Megatron cannot make
            such stages; names the keys and the nearest sizes that do.
    """
    _check_shares(pruned, parallel)
    layout = parallel
    if pruned.num_layers != config.num_layers:
        hybrid = pruned.hybrid_layer_pattern is not None
        split = by_cost(pruned, parallel) if hybrid else None
        layout = split or balanced_pipeline(pruned.num_layers, parallel)
    check_layout(pruned, layout)
    return layout


def _check_shares(pruned: ModelConfig, parallel: ParallelConfig) -> None:
    """Check that every rank gets an equal share of what the ranks share out."""
    for name, degree in split_sizes(pruned).items():
        size, ranks = getattr(pruned, name), getattr(parallel, degree)
        if size % ranks:
            below, above = size // ranks * ranks, -(-size // ranks) * ranks
            raise ValueError(
                f"{name}={size} after pruning cannot be shared equally by parallel.{degree}="
                f"{ranks} ranks; set pruning.target.{name} to "
                f"{f'{below} or ' if below else ''}{above}, or prune the checkpoint instead of the "
                "model in memory (minitron prune needs no ranks)"
            )


def layer_cost(config: ModelConfig, kind: str) -> int:
    """Return multiplications of a token in a hybrid model's layer, without attention's scores.

    Args:
        config: global sizes.
        kind: the letter of the layer.
    """
    hidden, matrices = config.hidden_size, 2 + config.gated_linear_unit
    if kind == ATTENTION:
        rows = 2 * config.num_attention_heads + 2 * config.num_query_groups
        return hidden * rows * config.kv_channels
    if kind == MLP:
        return matrices * hidden * config.ffn_hidden_size
    if kind == EXPERTS:
        routed = config.moe_router_topk * (config.moe_ffn_hidden_size or 0)
        shared = config.moe_shared_expert_intermediate_size or 0
        return hidden * (matrices * (routed + shared) + (config.num_moe_experts or 0))
    heads, state = config.mamba_num_heads or 0, config.mamba_state_dim or 0
    inner = heads * (config.mamba_head_dim or 0)
    rows = 3 * inner + 2 * (config.mamba_num_groups or 0) * state + heads
    return hidden * rows + 3 * inner * state  # the scan multiplies three times


def by_cost(config: ModelConfig, parallel: ParallelConfig) -> ParallelConfig | None:
    """The split of a hybrid model over the pipeline in which the costliest chunk costs least.

    Returns:
        None where there is no pipeline, or fewer layers than chunks.
    """
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    parts = parallel.pipeline_model_parallel_size * chunks
    costs = [layer_cost(config, kind) for kind in config.hybrid_layer_pattern or ""]
    if parallel.pipeline_model_parallel_size == 1 or len(costs) < parts:
        return None
    layout = "|".join("t" * size for size in _least_largest(costs, parts))
    return replace(
        parallel,
        num_layers_in_first_pipeline_stage=None,
        num_layers_in_last_pipeline_stage=None,
        pipeline_model_parallel_layout=f"E{layout}L",
    )


def _least_largest(costs: list[int], parts: int) -> list[int]:
    """Return sizes of ``parts`` runs of layers, the largest sum of which is as small as can be."""
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_packed(costs, middle)) <= parts:
            high = middle
        else:
            low = middle + 1
    sizes = _packed(costs, low)
    while len(sizes) < parts:  # fewer runs were enough: halve the longest
        index = sizes.index(max(sizes))
        sizes[index : index + 1] = [sizes[index] - sizes[index] // 2, sizes[index] // 2]
    return sizes


def _packed(costs: list[int], limit: int) -> list[int]:
    """Return sizes of runs that are as long as a limit of their sum allows."""
    sizes, total = [0], 0
    for cost in costs:
        if total + cost > limit:
            sizes.append(0)
            total = 0
        sizes[-1] += 1
        total += cost
    return sizes


def balanced_pipeline(num_layers: int, parallel: ParallelConfig) -> ParallelConfig:
    """Return pipeline split with stages that differ by at most one layer.

    With interleaving every stage holds the same number of layers in each of its chunks, so stages
    are equal or differ by at least the number of chunks: only equal ones are accepted.

    Args:
        num_layers: of the whole model.
        parallel: the degrees; its first and last stage sizes and its layout are replaced.

    Raises:
        ValueError: Megatron cannot make such a split; names the nearest numbers of layers it can.
    """
    uneven = _first_and_last(num_layers, parallel)
    if uneven is None:
        pp = parallel.pipeline_model_parallel_size
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        interleaved = f" x virtual_pipeline_model_parallel_size={chunks}" if chunks > 1 else ""
        raise ValueError(
            f"num_layers={num_layers} after pruning cannot be spread over parallel."
            f"pipeline_model_parallel_size={pp}{interleaved} in stages that differ by at most one "
            "layer: Megatron can give only the first and the last stage another size"
            f"{' (a multiple of the chunks)' if chunks > 1 else ''}; keep "
            f"{_nearest(num_layers, parallel)} layers (pruning.target.num_layers or "
            "pruning.drop_layers), or prune the checkpoint instead of the model in memory "
            "(minitron prune) and load it at another layout"
        )
    return replace(
        parallel,
        num_layers_in_first_pipeline_stage=uneven[0],
        num_layers_in_last_pipeline_stage=uneven[1],
        pipeline_model_parallel_layout=None,
    )


def _first_and_last(
    num_layers: int, parallel: ParallelConfig
) -> tuple[int | None, int | None] | None:
    """Return sizes of the first and the last stage, None where it is as long as the others.

    Where there is a choice the last stage is the shorter one: it holds the output layer too.

    Returns:
        None when there is no such split.
    """
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    short, longer = divmod(num_layers, pp)  # `longer` stages hold one layer more than `short`
    if short % chunks or short == 0:
        return None
    if longer == 0:
        return None, None
    if chunks > 1:
        return None
    if longer == pp - 1:
        return None, short
    if longer == 1:
        return short + 1, None
    if longer == pp - 2:
        return short, short
    return (short + 1, short + 1) if longer == 2 else None


def _nearest(num_layers: int, parallel: ParallelConfig) -> str:
    pp = parallel.pipeline_model_parallel_size
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    below = range(num_layers - 1, 0, -1)
    above = range(num_layers + 1, num_layers + pp * chunks + 1)
    found = [
        next((n for n in side if _first_and_last(n, parallel) is not None), None)
        for side in (below, above)
    ]
    return " or ".join(str(n) for n in found if n is not None)

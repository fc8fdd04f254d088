"""Plan where every parameter of a layer goes when a model is pruned in memory. Pure torch.

A layer's parameters are held by the tensor-parallel ranks of one pipeline stage; experts, where
there are any, are spread over the expert-parallel ranks besides. All else is the same on every
expert-parallel rank and stays on it.
"""

from dataclasses import dataclass

import torch

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.families.dims import DIMS
from nemo_minitron.families.table import Family, Row
from nemo_minitron.pruning.exchange import Move, Transfer, equal_shares, plan_transfers
from nemo_minitron.pruning.plan import Plan
from nemo_minitron.pruning.slicing import dim_indices


@dataclass(frozen=True)
class Grid:
    """Ranks of the group that rows travel in.

    Attributes:
        ranks: ``[expert-parallel rank][pipeline stage][tensor-parallel rank]``.
        expert_rank: this rank's expert-parallel rank.
    """

    ranks: list[list[list[int]]]
    expert_rank: int

    def holders(self, stage: int, row: Row, config: ModelConfig) -> list[int]:
        """Return ranks that hold a parameter, in tensor-parallel order.

        Args:
            stage: pipeline stage of its layer.
            row: bound to its expert where it is an expert's.
            config: sizes of the model that ``row`` is of.
        """
        holder = self.expert_rank
        if row.expert is not None:
            holder = row.expert // ((config.num_moe_experts or 0) // len(self.ranks))
        return self.ranks[holder][stage]


def rows_of_layers(family: Family, config: ModelConfig) -> list[list[Row]]:
    """Return rows of the parameters of every layer, those of experts one by one."""
    rows: list[list[Row]] = [[] for _ in range(config.num_layers)]
    for _, row, layer in family.parameters(config):
        if layer is not None:
            rows[layer].append(row)
    return rows


def row_before(row: Row, plan: Plan, position: int) -> Row:
    """Return the row before pruning of a row after: another expert's, where experts are dropped."""
    if row.expert is None or row.template is None:
        return row
    return row.template.of_expert(plan["expert"][position][row.expert])


def plan_move(
    row: Row,
    config: ModelConfig,
    pruned: ModelConfig,
    plan: Plan,
    position: int,
    path: tuple[int, int],
    grid: Grid,
) -> Move | None:
    """Return how one parameter gets to the ranks that are to hold it.

    Args:
        row: of the pruned model.
        config: the model before pruning.
        pruned: the model after pruning.
        plan: what to keep.
        position: position of the layer in ``plan.layers``.
        path: pipeline stage of the layer before and after.
        grid: the ranks.

    Returns:
        None when every rank keeps exactly what it has.
    """
    senders = grid.holders(path[0], row_before(row, plan, position), config)
    receivers = grid.holders(path[1], row, pruned)
    kept = None
    if row.tp_dim is not None:
        kept = dim_indices(row.dims[row.tp_dim], config, plan, position, row.expert)
    if row.tp_dim is None or kept is None:
        if senders == receivers:
            return None
        pairs = zip(senders, receivers, strict=True)
        return Move(0, [Transfer(sender, receiver) for sender, receiver in pairs])
    dim = DIMS[row.dims[row.tp_dim]]
    owned = equal_shares(torch.arange(dim.size(config)), len(senders), dim.blocks(config))
    wanted = equal_shares(kept, len(receivers), dim.blocks(pruned))
    transfers = plan_transfers(
        dict(zip(senders, owned, strict=True)), dict(zip(receivers, wanted, strict=True))
    )
    return Move(row.tp_dim, transfers)

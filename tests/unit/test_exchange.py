"""Who sends which rows to whom, without ranks."""

import pytest
import torch

from nemo_minitron.pruning.exchange import equal_shares, plan_transfers, travel_order


def carry(owned: dict[int, torch.Tensor], wanted: dict[int, torch.Tensor]):
    """Follow the transfers; rows are their own global index. Returns shards and rows that moved."""
    out = {rank: torch.full((len(rows),), -1) for rank, rows in wanted.items()}
    moved = 0
    for transfer in plan_transfers(owned, wanted):
        assert transfer.put is not None
        out[transfer.target][transfer.put] = owned[transfer.source][transfer.take]
        moved += len(transfer.put) * (transfer.source != transfer.target)
    return out, moved


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_everybody_gets_an_equal_contiguous_share(ranks: int, parts: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size, count = 24, 12
    block = torch.randperm(size, generator=generator)[:count].sort().values
    winners = torch.cat([block + size * part for part in range(parts)])
    owned = dict(enumerate(equal_shares(torch.arange(size * parts), ranks, [size] * parts)))
    wanted = dict(enumerate(equal_shares(winners, ranks, [count] * parts)))
    found, moved = carry(owned, wanted)
    for rank in range(ranks):
        share = count // ranks
        mine = [block[rank * share : (rank + 1) * share] + size * part for part in range(parts)]
        assert torch.equal(found[rank], torch.cat(mine))
    owner = {int(row): rank for rank, rows in owned.items() for row in rows}
    expected = sum(owner[int(row)] != rank for rank in range(ranks) for row in found[rank])
    assert moved == expected


def test_rows_that_stay_are_in_no_message() -> None:
    shares = equal_shares(torch.arange(8), 2)
    transfers = plan_transfers(dict(enumerate(shares)), dict(enumerate(shares)))
    assert [(t.source, t.target) for t in transfers] == [(0, 0), (1, 1)]


def test_other_ranks_may_be_the_target() -> None:
    owned = {0: torch.tensor([0, 1]), 1: torch.tensor([2, 3])}
    found, moved = carry(owned, {5: torch.tensor([1]), 4: torch.tensor([3, 0])})
    assert found[5].tolist() == [1]
    assert found[4].tolist() == [3, 0]
    assert moved == 3


def test_rows_of_nobody_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no rank owns rows \[2\]"):
        plan_transfers({0: torch.tensor([0, 1, 3])}, {0: torch.tensor([1, 2])})


@pytest.mark.parametrize(("pp", "chunks"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (4, 4)])
@pytest.mark.parametrize("per_chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("kept_are", ["first", "last", "outer", "random"])
def test_no_rank_holds_more_than_one_layer_extra(
    pp: int, chunks: int, per_chunk: int, kept_are: str
) -> None:
    total, count = 4 * pp * chunks, pp * chunks * per_chunk
    kept = {
        "first": list(range(count)),
        "last": list(range(total - count, total)),
        "outer": [*range(count // 2), *range(total - count + count // 2, total)],
        "random": torch.randperm(total, generator=torch.Generator().manual_seed(0))[:count]
        .sort()
        .values.tolist(),
    }[kept_are]
    places = [layer * pp * chunks // total for layer in range(total)]
    sources = [places[layer] for layer in kept]
    targets = [position // per_chunk for position in range(count)]
    held = [sum(place % pp == rank for place in sources) for rank in range(pp)]
    order = travel_order(sources, targets)
    assert sorted(order) == list(range(count))
    for position in order:
        giver, taker = sources[position] % pp, targets[position] % pp
        held[taker] += giver != taker
        assert max(held) <= total // pp + 1
        held[giver] -= giver != taker
    assert held == [chunks * per_chunk] * pp

"""Drawing tokens, against the definition of nucleus sampling written out."""

import pytest
import torch

from nemo_minitron.models.inference import GREEDY, Sampling, draws_of, sample_tokens


def nucleus(logits: torch.Tensor, sampling: Sampling) -> dict[int, float]:
    """Probability of every token that may be drawn."""
    odds = (logits.double() / sampling.temperature).softmax(-1).tolist()
    order = sorted(range(len(odds)), key=lambda i: (-odds[i], i))
    kept: list[int] = []
    mass = 0.0
    for index in order:
        if kept and mass >= sampling.top_p:
            break
        kept.append(index)
        mass += odds[index]
    return {index: odds[index] / mass for index in kept}


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(1.0, 1.0), (1.0, 0.6), (0.5, 0.9), (2.0, 0.01)]
)
def test_shares_are_those_of_the_nucleus(temperature, top_p):
    sampling = Sampling(temperature, top_p)
    logits = torch.randn(11, generator=torch.Generator().manual_seed(1))
    count = 4000
    even = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = sample_tokens(logits.expand(count, -1), sampling, even).bincount(minlength=11)
    want = nucleus(logits, sampling)
    for token, hits in enumerate(found.tolist()):
        assert hits / count == pytest.approx(want.get(token, 0.0), abs=1.5 / count)


def test_ends_of_the_interval_and_ties():
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    edge = [0.0, 1 - 2**-53]
    found = [sample_tokens(logits, Sampling(1.0, 0.5), torch.tensor([u]).double()) for u in edge]
    assert [int(x) for x in found] == [1, 2]
    assert int(sample_tokens(logits, GREEDY, torch.zeros(1).double())) == 1


def test_draws_depend_on_seed_and_sample_alone():
    assert torch.equal(draws_of(1, 7, 5), draws_of(1, 7, 9)[:5])
    assert not torch.equal(draws_of(1, 7, 5), draws_of(1, 8, 5))
    assert not torch.equal(draws_of(1, 7, 5), draws_of(2, 7, 5))
    many = torch.stack([draws_of(3, index, 50) for index in range(100)])
    assert many.mean().item() == pytest.approx(0.5, abs=0.02)

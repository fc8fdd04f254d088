"""Every loss on vocabulary shards equals plain autograd on the whole logits, in fp64."""

from functools import partial

import pytest
import torch

from tests.cases.loss import config_of, sharded_losses
from tests.helpers.losses import problem, reference

# Over 4 ranks: 101 ends in padding, 9 leaves the last rank no vocabulary and every rank fewer rows
# than top_k.
VOCABULARIES = [101, 9]


def _want(vocab: int, kind: str) -> list[torch.Tensor]:
    inputs, config = problem(vocab), config_of(kind)
    hidden, weight = (inputs[name].requires_grad_() for name in ("hidden", "weight"))
    teacher = inputs["teacher_hidden"] @ inputs["teacher_weight"].t()
    logits = hidden @ weight.t()
    parts, total = reference(config, logits, teacher, inputs["labels"], inputs["mask"])
    (total / 2).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [parts.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("tp", [2, 4])
def test_shards_equal_the_whole(ranks, tp):
    by_rank = ranks.run(tp, sharded_losses, VOCABULARIES)
    for vocab, kind in by_rank[0]:
        parts, hidden, weight = _want(vocab, kind.removeprefix("stored_"))
        whole = torch.cat([found[vocab, kind][2] for found in by_rank])

        def note(text: str, at: str = f"vocabulary {vocab}, {kind}") -> str:
            return f"{at}: {text}"

        close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9, msg=note)
        for found in by_rank:
            close(found[vocab, kind][0], parts)
            close(found[vocab, kind][1], hidden)
        close(whole[:vocab], weight)
        assert not whole[vocab:].any(), f"{kind}: padding rows have a gradient"

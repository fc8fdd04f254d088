"""An axis exists in one place: a row that only this test adds is scored, pruned and exported.

Its indices are the channels of a head, in pairs and the same in all heads of a layer, of a model
that does not rotate queries and keys. The package knows no such axis; which rows of a tensor belong
to it follows from the dims of ``linear_qkv`` and ``linear_proj``, whose heads are ``head_dim`` rows
each.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint.hf import to_hf, write_hf
from nemo_minitron.checkpoint.torch_dist import read_torch_dist
from nemo_minitron.config.axes import AXES, Axis, Scope
from nemo_minitron.config.layers import ATTENTION
from nemo_minitron.config.stages import PruningConfig, TargetConfig
from nemo_minitron.families.registry import family_of, written_config
from nemo_minitron.pruning.plan import Plan, pruned_config
from nemo_minitron.pruning.slicing import prune_checkpoint
from tests.cases.live import score_and_prune
from tests.cases.live_truth import (
    Truth,
    close_logits,
    equal_weights,
    layout,
    make_truth,
    score_error,
)
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import SMOLLM3, random_weights

MODEL = replace(SMOLLM3, no_rope_freq=[1, 1, 1, 1], hf={"pad_token_id": None, "bos_token_id": 0})
LAYOUTS = {"TP1": layout(), "TP2": layout(tp=2), "PP2": layout(pp=2)}

HEAD_CHANNELS = Axis(
    "head_dim",
    size="kv_channels",
    scope=Scope.LAYER,
    kind=ATTENTION,
    seen_at="self_attention.linear_proj",
    seen_dim="head",
    grain=2,
    label="head channels",
)


def with_the_axis(task: Callable[..., Any], *args: Any) -> Any:
    """Run a task where the axis exists: a worker of the pool has the table of the package."""
    AXES[HEAD_CHANNELS.name] = HEAD_CHANNELS
    try:
        return task(*args)
    finally:
        del AXES[HEAD_CHANNELS.name]


class Ranks(WorkerPool):
    """The pool of ranks, every task of which knows the axis."""

    def __init__(self, ranks: WorkerPool) -> None:
        self.ranks = ranks

    def run(self, size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        return self.ranks.run(size, with_the_axis, fn, *args)


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Truth]:
    """Scores of one rank; the axis exists in this process until the tests of this file end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AXES, HEAD_CHANNELS.name, HEAD_CHANNELS)
        yield make_truth(Ranks(ranks), tmp_path_factory.mktemp("axis"), MODEL)


def exported_logits(truth: Truth, plan: Plan, folder: Path) -> torch.Tensor:
    """Logits of transformers, of the checkpoint that was pruned as a stream and then exported."""
    prune_checkpoint(truth.folder, truth.config, plan, folder / "streamed", workers=1)
    small = pruned_config(truth.config, plan)
    family = family_of(small)
    store = to_hf(family, small, read_torch_dist(folder / "streamed", family, small))
    (folder / "hf").mkdir()
    write_hf(folder / "hf", store, written_config(small), "5GB")
    model = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32).eval()
    with torch.no_grad():
        logits: torch.Tensor = model(truth.ids).logits
    return logits


def test_a_row_is_an_axis(truth: Truth, tmp_path: Path) -> None:
    alone, several = {"kv_channels": 8}, {"num_layers": 3, "hidden_size": 40, "kv_channels": 6}
    several |= {"num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 64}
    ways = {"alone": alone, "several": several}
    prunings = {name: PruningConfig(target=TargetConfig(sizes)) for name, sizes in ways.items()}
    plans = {name: truth.plan(pruning) for name, pruning in prunings.items()}
    assert truth.scores["head_dim"].shape == (4, 12)
    for name, parallel in LAYOUTS.items():
        arguments = (MODEL, str(truth.folder), truth.ids, parallel, prunings, str(tmp_path / name))
        for found in truth.ranks.run(parallel.world_size(), score_and_prune, *arguments):
            assert score_error(found["scores"], truth.scores) < 1e-5
            assert {way: found[way]["plan"] for way in ways} == plans
        assert all(equal_weights(truth, plan, tmp_path / name / way) for way, plan in plans.items())
    for way, plan in plans.items():
        (tmp_path / f"{way} exported").mkdir()
        found = exported_logits(truth, plan, tmp_path / f"{way} exported")
        close_logits(truth.logits(plan), found, MODEL)


def test_rows_are_those_of_the_kept_channels(truth: Truth) -> None:
    plan = truth.plan(PruningConfig(target=TargetConfig(kv_channels=8)))
    kept, whole = plan["head_dim"], random_weights(MODEL)
    assert len({tuple(channels) for channels in kept}) > 1, "all layers keep the same channels"
    for name, tensor in truth.weights(plan).items():
        if "self_attention" not in name:
            assert torch.equal(tensor, whole[name])
            continue
        channels, dim = kept[int(name.split(".")[2])], int("linear_proj" in name)
        assert [channel // 2 for channel in channels[::2]] == [c // 2 for c in channels[1::2]]
        blocks = whole[name].unflatten(dim, (-1, 12)).index_select(dim + 1, torch.tensor(channels))
        assert torch.equal(tensor, blocks.flatten(dim, dim + 1))


def test_a_size_between_two_pairs_is_refused(truth: Truth) -> None:
    with pytest.raises(ValueError, match=r"target.kv_channels=7 must be a multiple of 2"):
        truth.plan(PruningConfig(target=TargetConfig(kv_channels=7)))

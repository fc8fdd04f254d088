"""Aggregations against naive formulas; score files."""

import itertools
import json

import pytest
import torch

from nemo_minitron.importance.aggregate import Accumulator, BlockInfluence, partial_sums
from nemo_minitron.pruning.scores import Scores, check_model, model_meta, read_meta
from tests.helpers.tiny import LLAMA

KINDS = ("mean", "l2", "var")


def naive(values: torch.Tensor, kind: str, dim: int) -> torch.Tensor:
    """2407.14679, section 2.2, as printed."""
    if kind == "mean":
        return values.abs().mean(dim)
    if kind == "l2":
        return values.square().sum(dim).sqrt()
    return values.var(dim, correction=0)


def stream(x: torch.Tensor, batch: str, seq: str, micro: int, shards: int = 1) -> torch.Tensor:
    """Scores of ``[s, b, m, w]``, ``micro`` samples and 1/shards of the positions at a time."""
    modules, width = x.shape[2:]
    acc = Accumulator(modules, width, batch=batch, seq=seq, device=torch.device("cpu"))
    for first in range(0, x.size(1), micro):
        piece = x[:, first : first + micro]
        valid = piece.size(1)
        if valid < micro:  # filler, as the sampler makes it
            piece = torch.cat([piece, torch.full_like(piece[:, : micro - valid], 1e3)], dim=1)
        total = torch.zeros(())
        for shard in piece.chunk(shards):
            for module in range(modules):
                acc.observe(module, shard[:, :, module])
            total = total + acc.partials()
        acc.commit(total, x.size(0), valid)
    return acc.scores()


@pytest.mark.parametrize(("batch", "seq"), itertools.product(KINDS, KINDS))
@pytest.mark.parametrize(("micro", "shards"), [(1, 1), (3, 1), (7, 4)])
def test_nine_aggregations(batch: str, seq: str, micro: int, shards: int) -> None:
    torch.manual_seed(0)
    # Channels of unequal size and offset: var must not drown in a large mean.
    x = torch.randn(16, 7, 3, 5) * torch.tensor([0.1, 1.0, 3.0, 1.0, 1.0])
    x = x + torch.tensor([0.0, 0.0, 1.0, 30.0, -5.0])
    expected = naive(naive(x.double(), seq, 0), batch, 0)
    torch.testing.assert_close(stream(x, batch, seq, micro, shards), expected, rtol=1e-5, atol=0)


def test_default_is_seq_mean_then_batch_l2() -> None:
    x = torch.randn(8, 4, 1, 6)
    expected = x.abs().mean(0).square().sum(0).sqrt()
    torch.testing.assert_close(stream(x, "l2", "mean", 2), expected.double(), rtol=1e-6, atol=0)


def test_low_precision_inputs_are_summed_in_fp32() -> None:
    x = (torch.rand(4096, 1, 4) + 0.5).bfloat16()
    for seq in KINDS:
        out = partial_sums(x, seq, torch.float64 if seq == "var" else torch.float32)
        expected = (x.double() ** 2 if seq == "l2" else x.double()).sum(0)
        torch.testing.assert_close(out[0].double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_block_influence(micro: int) -> None:
    torch.manual_seed(0)
    states = [torch.randn(6, 5, 8)]
    for _ in range(3):
        states.append(states[-1] + 0.3 * torch.randn(6, 5, 8))
    influence = BlockInfluence(3, device=torch.device("cpu"))
    for first in range(0, 5, micro):
        parts = [state[:, first : first + micro] for state in states]
        valid = parts[0].size(1)
        parts = [torch.nn.functional.pad(p, (0, 0, 0, micro - valid), value=1.0) for p in parts]
        for layer in range(3):
            influence.observe(layer, parts[layer], parts[layer + 1])
        influence.commit(valid)
    expected = torch.stack(
        [
            1 - torch.cosine_similarity(a.double(), b.double(), dim=-1).mean()
            for a, b in itertools.pairwise(states)
        ]
    )
    torch.testing.assert_close(influence.scores(), expected, rtol=1e-5, atol=0)


def test_no_samples_is_an_error() -> None:
    acc = Accumulator(1, 2, batch="mean", seq="mean", device=torch.device("cpu"))
    acc.observe(0, torch.ones(3, 1, 2))
    acc.commit(acc.partials(), 3, 0)
    with pytest.raises(ValueError, match=r"data\.num_samples"):
        acc.scores()


def make_scores() -> Scores:
    return Scores(
        hidden=torch.rand(LLAMA.hidden_size),
        layer=torch.rand(LLAMA.num_layers),
        meta={"model": model_meta(LLAMA), "num_samples": 3},
    )


def test_files_round_trip(tmp_path) -> None:
    scores = make_scores()
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert torch.equal(loaded["hidden"], scores["hidden"])
    assert torch.equal(loaded["layer"], scores["layer"])
    assert "ffn" not in loaded
    assert read_meta(tmp_path)["axes"] == ["hidden", "layer"]
    assert read_meta(tmp_path)["num_samples"] == 3
    check_model(LLAMA, read_meta(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("axes", 7, "axes is of type int, not list"),
        ("axes", None, "axes is of type NoneType, not list"),
        ("model", [], "model is of type list, not dict"),
        ("aggregation", "mean", "aggregation is of type str, not dict"),
    ],
)
def test_values_of_other_kinds(tmp_path, key, value, words) -> None:
    make_scores().save(tmp_path)
    path = tmp_path / "scores.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ValueError, match=rf"scores.json is damaged: {words}"):
        read_meta(tmp_path)


def test_layer_scores_round_trip(tmp_path) -> None:
    scores = make_scores()
    scores["layer_lm_loss"] = torch.rand(LLAMA.num_layers)
    scores |= {"block_angular.2": torch.rand(3), "block_lm_loss.3": torch.rand(2)}
    scores.save(tmp_path)
    loaded = Scores.load(tmp_path)
    assert loaded.keys() == scores.keys()
    for name, tensor in scores.items():
        assert torch.equal(loaded[name], tensor)
    names = ["hidden", "layer", "layer_lm_loss", "block_angular.2", "block_lm_loss.3"]
    assert read_meta(tmp_path)["axes"] == names


def test_bad_files_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"scores\.json; set importance to"):
        read_meta(tmp_path)
    scores = make_scores()
    scores["hidden"][3] = float("nan")
    scores.save(tmp_path)
    with pytest.raises(ValueError, match="1 of 64 hidden scores are NaN"):
        Scores.load(tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(ValueError, match="cannot be read"):
        Scores.load(tmp_path)
    (tmp_path / "scores.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="run minitron importance again"):
        read_meta(tmp_path)

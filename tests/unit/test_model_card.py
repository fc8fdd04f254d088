"""The model card, and the lineage that it is written from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from nemo_minitron.checkpoint.artifact import open_result, output_folder
from nemo_minitron.checkpoint.lineage import (
    LINEAGE,
    front_matter,
    read_lineage,
    read_source_card,
    record,
)
from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.stages import (
    DistillConfig,
    ExportConfig,
    FinetuneConfig,
    ImportanceConfig,
    ImportConfig,
    PruneConfig,
    PruningConfig,
    TargetConfig,
    TeacherLogitsConfig,
)
from nemo_minitron.config.training import DataConfig
from nemo_minitron.config.training_stages import TrainingStageConfig
from nemo_minitron.pruning.scores import Scores, model_meta
from nemo_minitron.reporting.model_card import model_card
from nemo_minitron.stages import export, import_, prune
from nemo_minitron.stages.recipe import training_entry
from tests.helpers.gguf_fixtures import llama, write_gguf

README = """\
---
license: other
license_name: some-model-licence
license_link: LICENSE
datasets:
- a/b
---
# Some model
"""
CARRIED = {
    "LICENSE": "The licence.",
    "USE_POLICY.md": "The policy.",
    "generation_config.json": '{"eos_token_id": 0, "do_sample": true, "temperature": 0.5}',
    "chat_template.jinja": "{{ messages }}",
    "tokenizer_config.json": '{"eos_token": "</s>"}',
}
DATA = DataConfig(path="/data/texts/calibration.jsonl", seq_length=32, global_batch_size=4)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``Some-Model`` imported, corrected, scored, pruned and distilled; nothing was trained."""
    home = tmp_path_factory.mktemp("card")
    model = llama(tie_word_embeddings=True).to(torch.bfloat16)
    model.save_pretrained(home / "Some-Model")
    for name, text in CARRIED.items():
        (home / "Some-Model" / name).write_text(text)
    (home / "Some-Model" / "README.md").write_text(README)
    cfg = ImportConfig(source=str(home / "Some-Model"), output_dir=str(home / "whole"))
    import_.run(cfg)
    finetuning = FinetuneConfig(
        checkpoint=str(home / "whole"), output_dir=str(home / "teacher"), data=DATA
    )
    trained(finetuning, "finetune", home / "whole", tokens=1_000_000)
    write_scores(home)
    pruning = PruningConfig(target=TargetConfig(num_layers=2, ffn_hidden_size=41))
    prune.run(
        PruneConfig(
            checkpoint=str(home / "teacher"),
            importance=str(home / "scores"),
            output_dir=str(home / "pruned"),
            pruning=pruning,
        )
    )
    distilling = DistillConfig(
        student=str(home / "pruned"),
        teacher=str(home / "teacher"),
        output_dir=str(home / "student"),
        data=DATA,
    )
    trained(distilling, "distill", home / "pruned", tokens=2_345_678)
    return home


def trained(cfg: TrainingStageConfig, stage: str, source: Path, tokens: int) -> None:
    """A result of a training stage that left the weights as they are."""
    with output_folder(cfg, stage, {}) as work:
        shutil.copytree(source / "checkpoint", work / "checkpoint")
        metrics = {"train_tokens": float(tokens), "loss": 1.23456, "val_loss": None}
        config = ModelConfig.load(source / "checkpoint")
        entry = training_entry(cfg, stage, config, metrics)
        record(source / "checkpoint", work / "checkpoint", entry)


def write_scores(home: Path) -> None:
    config = ModelConfig.load(home / "teacher" / "checkpoint")
    layer = torch.tensor([0.9, 0.1, 0.8])
    scores = Scores(ffn=torch.rand(3, 96), layer=layer)
    scores.meta = {
        "model": model_meta(config),
        "aggregation": {"batch": "l2", "seq": "mean"},
        "data": {"seq_length": 32, "split_name": "train"},
        "num_samples": 128,
        "num_tokens": 4096,
    }
    cfg = ImportanceConfig(checkpoint="-", data=DATA, output_dir=str(home / "scores"))
    with output_folder(cfg, "importance", {}) as work:
        scores.save(work)


@pytest.fixture(scope="module")
def exported(home: Path) -> Path:
    cfg = ExportConfig(checkpoint=str(home / "student"), output_dir=str(home / "Some-Minitron"))
    export.check(cfg)
    export.run(cfg)
    return home / "Some-Minitron"


def test_card_says_what_was_done(exported: Path) -> None:
    text = (exported / "README.md").read_text()
    for part in (
        "# Some-Minitron\n",
        "made from `Some-Model` (Hugging Face) with",
        "| `num_layers` | 3 | 2 | 66.7% |",
        "| `ffn_hidden_size` | 96 | 41 | 42.7% |",
        "| `hidden_size` | 64 | 64 |  |",
        "kept (0-based): [0, 2]. Dropped: [1].",
        "1. `import` of `Some-Model` (Hugging Face)",
        "2. `finetune`: ",
        "3. `prune`: ",
        "without layers 2 (counted from 1).",
        "`pruning.target.num_layers=2`, `pruning.target.ffn_hidden_size=41`, "
        "`pruning.layer_criterion=block_influence`",
        "4. `distill`, teacher `teacher` (",
        ", import, finetune): ",
        "; loss 1.2346 at the end.",
        "`distillation.loss=forward_kl`, `distillation.temperature=1.0`",
        "`optim.lr=0.0001`",
        "| finetune | `calibration.jsonl` | 1,000,000 |",
        "| distill | `calibration.jsonl` | 2,345,678 |",
        "|  | ffn, layer | mean | l2 | `calibration.jsonl` (train) | 128 | 4,096 |",
        "`license: other`, `license_name: some-model-licence`, `license_link: LICENSE`",
    ):
        assert part in text, part
    assert "/data" not in text
    assert str(exported.parent) not in text


def test_card_is_one_that_the_hub_reads(exported: Path) -> None:
    data = ModelCard.load(exported / "README.md").data
    assert (data.license, data.license_name) == ("other", "some-model-licence")
    assert data.tags == ["minitron", "pruning", "distillation"]
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")


def test_what_else_is_carried_over(exported: Path) -> None:
    """Through import, prune, training and export."""
    for name, text in CARRIED.items():
        assert (exported / name).read_text() == text
    model = AutoModelForCausalLM.from_pretrained(exported, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert model.config.tie_word_embeddings
    assert model.generation_config.temperature == 0.5
    tensors = load_file(exported / "model.safetensors")
    assert "lm_head.weight" not in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_an_untouched_model(home: Path, tmp_path: Path) -> None:
    export.run(ExportConfig(checkpoint=str(home / "whole"), output_dir=str(tmp_path / "x")))
    text = (tmp_path / "x" / "README.md").read_text()
    assert "| `num_layers` | 3 |\n" in text
    assert "before" not in text
    assert ModelCard(text).data.to_dict()["tags"] == ["minitron"]


def test_layers_without_a_lineage(home: Path) -> None:
    """A checkpoint of before there was one."""
    config = ModelConfig.load(home / "student" / "checkpoint")
    text = model_card("x", config, [])
    assert "kept (0-based): [0, 2].\n" in text
    assert "Recipe" not in text


def test_rounds_and_stored_teachers(home: Path, tmp_path: Path) -> None:
    """Scores of the rounds of one ``prune``; a teacher of which only its logits are left."""
    pruned = read_lineage(home / "pruned" / "checkpoint")
    first = pruned[-1]["scores"][0]
    pruned[-1]["scores"] = [{"round": number, **first} for number in (1, 2)]
    stored = TeacherLogitsConfig(
        checkpoint="/models/Large-Teacher", output_dir=str(tmp_path / "logits"), data=DATA
    )
    with output_folder(stored, "teacher_logits", {}):
        pass
    cfg = DistillConfig(
        student="-",
        teacher_logits=str(tmp_path / "logits"),
        output_dir="-",
        data=DATA,
        distillation=DistillationConfig(loss="top_k", top_k=4),
    )
    config = ModelConfig.load(home / "pruned" / "checkpoint")
    entry = training_entry(cfg, "distill", config, {"train_tokens": 1.0})
    text = model_card("x", config, [*pruned, entry])
    assert "| 1 | ffn, layer |" in text
    assert "| 2 | ffn, layer |" in text
    assert "`distill`, teacher `Large-Teacher` (its stored logits): " in text
    assert "`distillation.top_k=4`" in text
    assert str(tmp_path) not in text


def test_lineage_is_no_part_of_the_identity(home: Path, tmp_path: Path) -> None:
    """The same model under another name."""
    other = shutil.copytree(home / "Some-Model", tmp_path / "Another-Name")
    import_.run(ImportConfig(source=str(other), output_dir=str(tmp_path / "whole")))
    assert read_lineage(tmp_path / "whole" / "checkpoint") != read_lineage(
        home / "whole" / "checkpoint"
    )
    again = open_result(tmp_path / "whole", "full")
    assert again.id == open_result(home / "whole").id
    assert f"checkpoint/{LINEAGE}" in again.files


def test_damaged_lineage(tmp_path: Path) -> None:
    assert read_lineage(tmp_path) == []
    (tmp_path / LINEAGE).write_text("{")
    with pytest.raises(ValueError, match=r"lineage.json cannot be read"):
        read_lineage(tmp_path)
    (tmp_path / LINEAGE).write_text(json.dumps({"format": 2}))
    with pytest.raises(ValueError, match=r"lineage.json is not a format-1 lineage"):
        read_lineage(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("---\nlicense: mit\n---\n", {"license": "mit"}),
        ("---\r\nlicense: [mit, apache-2.0]\r\n---\r\n", {"license": ["mit", "apache-2.0"]}),
        ("---\nlicense: mit\n", {}),
        ("# License: mit\n", {}),
        ("---\n- license\n---\n", {}),
        ("---\nlicense: [mit\n---\n", {}),
        ("", {}),
    ],
)
def test_front_matter(tmp_path: Path, text: str, wanted: dict[str, object]) -> None:
    (tmp_path / "README.md").write_text(text, newline="")
    assert front_matter(tmp_path / "README.md") == wanted


def test_licence_of_a_gguf_file(tmp_path: Path) -> None:
    fields = {
        "general.license": "other",
        "general.license.name": "some-model-licence",
        "general.license.link": "https://example.org",
    }
    write_gguf(tmp_path / "model.gguf", llama(), fields=fields)
    assert read_source_card(tmp_path / "model.gguf") == {
        "name": "model.gguf",
        "format": "GGUF",
        "license": "other",
        "license_name": "some-model-licence",
        "license_link": "https://example.org",
    }
    import_.run(ImportConfig(source=str(tmp_path / "model.gguf"), output_dir=str(tmp_path / "in")))
    export.run(ExportConfig(checkpoint=str(tmp_path / "in"), output_dir=str(tmp_path / "out")))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license_link == "https://example.org"
    assert "`model.gguf` (GGUF)" in card.text


HOSTILE = "mit\n---\n# Hacked\n<script>alert(1)</script> `x` | y"


def test_text_of_others_stays_text(tmp_path: Path) -> None:
    """No heading, cell or HTML of a licence, a name or a setting gets into the card."""
    config = ModelConfig.load(imported(tmp_path) / "checkpoint")
    (entry,) = read_lineage(tmp_path / "whole" / "checkpoint")
    entry["source"] |= {"license": HOSTILE, "name": HOSTILE, "format": HOSTILE}
    entry |= {"stage": HOSTILE, "settings": {HOSTILE: HOSTILE}, "losses": {HOSTILE: HOSTILE}}
    entry |= {"data": {"name": HOSTILE, "tokens": HOSTILE}, "scores": [{"data": HOSTILE}]}
    card = model_card(HOSTILE, config, [entry])
    lines = card.splitlines()
    assert not [line for line in lines if line.startswith("# Hacked")]
    assert [line.strip() for line in lines].count("---") == 2  # around the front matter alone
    body = card.split("---\n", 2)[2].partition("## Use")[0]
    assert "<script>" not in "".join(body.replace("\\`", "").split("`")[::2])
    assert "<script>" in body
    assert ModelCard(card).data.to_dict()["license"] == " ".join(HOSTILE.split())


def imported(tmp_path: Path) -> Path:
    """A model without a README."""
    llama().save_pretrained(tmp_path / "model")
    import_.run(ImportConfig(source=str(tmp_path / "model"), output_dir=str(tmp_path / "whole")))
    return tmp_path / "whole"


def test_card_names_the_keys_that_were_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "Some-Model"
    llama(tie_word_embeddings=True).save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "scale_of_nothing": 1.5}))
    cfg = ImportConfig(source=str(source), output_dir=str(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"source_ignore=\[scale_of_nothing\]"):
        import_.check(cfg)
    cfg.source_ignore = ["scale_of_nothing"]
    import_.check(cfg)
    import_.run(cfg)
    export.run(
        ExportConfig(checkpoint=str(tmp_path / "whole"), output_dir=str(tmp_path / "exported"))
    )
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "without: `scale_of_nothing`." in card

"""LongRoPE: where one rotation for all tokens would be another model's, it is refused."""

from types import SimpleNamespace
from typing import Any

import pytest

from nemo_minitron.config.inference import BenchmarkConfig, EvaluateConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.models.documents import check_shared
from nemo_minitron.models.inference import CachedModel
from nemo_minitron.stages import benchmark, tasks
from tests.helpers.tiny import LLAMA, PHI3_LONG


def test_documents_do_not_share_long_samples() -> None:
    shared, parallel = SimpleNamespace(shared=True), ParallelConfig()
    says = "data.seq_length=17 above original_max_position_embeddings=16 .* data.seq_length=16"
    with pytest.raises(ValueError, match=says):
        check_shared(shared, DataConfig(seq_length=17), PHI3_LONG, parallel)
    check_shared(shared, DataConfig(seq_length=16), PHI3_LONG, parallel)
    check_shared(shared, DataConfig(seq_length=17), LLAMA, parallel)
    check_shared(SimpleNamespace(shared=False), DataConfig(seq_length=17), PHI3_LONG, parallel)


def test_no_text_grows_beyond_the_short_ones() -> None:
    """The longest one that is written, and that is measured."""
    assert (PHI3_LONG.max_written_length, LLAMA.max_written_length) == (16, 128)
    cfg = BenchmarkConfig(checkpoint=["x"], output_dir="-", prompt_length=10, new_tokens=8)
    with pytest.raises(ValueError, match="new_tokens=8 exceed the 16 positions of the model"):
        benchmark._check_size(cfg, PHI3_LONG)


def test_cached_texts_stay_short() -> None:
    """Also where no stage has looked at the length before."""
    stage: Any = SimpleNamespace(is_last_stage=False)
    chunk: Any = SimpleNamespace(built_from=(PHI3_LONG, ParallelConfig()))
    model = CachedModel(chunk, stage, 101)
    says = "length=17 must be at most original_max_position_embeddings=16 with rope_scaling of"
    with pytest.raises(ValueError, match=says):
        model.start(1, 17)


def test_requests_of_tasks_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer_files", "load_tokenizer", "check_installed"):
        monkeypatch.setattr(tasks, name, lambda *_: ["tokenizer.json"])
    cfg = EvaluateConfig(checkpoint="-", output_dir="-", tasks=["piqa"])
    assert (tasks.max_length(cfg, PHI3_LONG), tasks.max_length(cfg, LLAMA)) == (16, 128)
    cfg.lm_eval.max_length = 32
    says = "lm_eval.max_length=32 must be at most original_max_position_embeddings=16"
    with pytest.raises(ValueError, match=says):
        tasks.check_tasks(cfg, PHI3_LONG, export=False)

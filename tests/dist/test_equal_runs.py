"""Two equal trainings give results of one identity, wherever they lie."""

import pytest

from nemo_minitron.checkpoint.manifest import open_result
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import FinetuneConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.stages import finetune
from tests.helpers.pool import WorkerPool
from tests.helpers.tiny import LLAMA, write_npy, write_result


@pytest.mark.parametrize(
    "degrees", [{}, {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}]
)
def test_equal_trainings_have_one_identity(ranks: WorkerPool, tmp_path, degrees) -> None:
    write_result(tmp_path / "model", LLAMA, 3)
    write_npy(tmp_path / "data.npy", 8, 16, LLAMA.vocab_size)
    found = []
    for place in ("here", "another/folder"):
        cfg = FinetuneConfig(
            output_dir=str(tmp_path / place),
            checkpoint=str(tmp_path / "model"),
            data=DataConfig(path=str(tmp_path / "data.npy"), seq_length=16, global_batch_size=2),
            parallel=ParallelConfig(**degrees),
            trainer=TrainerConfig(max_steps=2, limit_val_batches=0, save_every_n_steps=0),
            optim=OptimConfig(),
        )
        ranks.run(2 if degrees else 1, finetune.run, cfg)
        found.append(open_result(cfg.output_dir))
    assert found[0].id == found[1].id
    for name in found[0].files:
        if name.startswith("checkpoint/"):
            content = (found[0].folder / name).read_bytes()
            assert str(tmp_path).encode() not in content, name

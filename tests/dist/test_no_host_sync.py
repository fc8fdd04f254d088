"""The host never waits for the device inside a global batch: micro-batches queue up behind it."""

from dataclasses import replace

import pytest

from nemo_minitron.config.parallel import ParallelConfig
from tests.cases.sync import waits
from tests.helpers.tiny import LLAMA, write_weights

STUDENT = replace(LLAMA, hidden_size=48)
LAYOUTS = {
    "single": (1, ParallelConfig()),
    "tp2_sp": (2, ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp2": (2, ParallelConfig(pipeline_model_parallel_size=2)),
}
LOSSES = {"kd": {}, "kd_ce": {"ce_weight": 0.5, "temperature": 2.0, "precision": "bf16-mixed"}}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("losses", LOSSES)
def test_no_wait_per_micro_batch(ranks, tmp_path, layout, losses):
    """Every operator that the step calls is looked at, those of Megatron's code included."""
    write_weights(tmp_path / "student", STUDENT, 1)
    write_weights(tmp_path / "teacher", LLAMA, 2)
    pair = ((STUDENT, str(tmp_path / "student")), (LLAMA, str(tmp_path / "teacher")))
    size, parallel = LAYOUTS[layout]
    for two, four in ranks.run(size, waits, *pair, parallel, LOSSES[losses], (2, 4)):
        more = {place: count for place, count in four.items() if count != two.get(place)}
        assert not more, f"per micro-batch: {more}"
        ours = [place for place in two if "nemo_minitron" in place]
        assert not ours, f"once per global batch: {ours}"

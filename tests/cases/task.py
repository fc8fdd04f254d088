"""Functions that the tests of tasks run on the ranks."""

from pathlib import Path
from typing import Any

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.runtime.launch import init_model_parallel

Ids = list[int]


def scores_at(
    folder: str, degrees: dict[str, Any], requests: list[tuple[Ids, Ids]]
) -> list[tuple[float, bool]]:
    """Scores of requests by the model of a ``checkpoint/`` at a layout."""
    from nemo_minitron.evaluation.requests import Request, RequestScorer
    from nemo_minitron.models.weights import load_frozen
    from nemo_minitron.runtime.groups import ParallelGroups

    parallel = ParallelConfig(**degrees)
    init_model_parallel(parallel)
    groups = ParallelGroups.current()
    chunks = load_frozen(Path(folder), parallel, groups)
    scorer = RequestScorer(
        chunks,
        groups,
        ModelConfig.load(Path(folder)).vocab_size,
        batch_size=2,
        multiple=parallel.sequence_multiple,
    )
    return scorer.score([Request(*pair) for pair in requests])

"""A checkpoint scored on a calibration set: for ``importance``, and in the rounds of ``prune``.

``docs/design/iterative.md`` describes the rounds.
"""

import logging
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemo_minitron.checkpoint.seals import check_seal, seal
from nemo_minitron.config.axes import score_axes
from nemo_minitron.config.megatron import ForwardMegatronConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.stages import BLOCK_CRITERIA, PruneConfig, PruningConfig, ScoreConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.data.datasets import stage_dataset
from nemo_minitron.importance.estimate import estimate_scores, forward_passes
from nemo_minitron.importance.resume import SavedState
from nemo_minitron.models.build import DTYPES
from nemo_minitron.models.documents import check_shared
from nemo_minitron.models.weights import load_frozen
from nemo_minitron.pruning.plan import Plan, full_plan, make_plan, pruned_config
from nemo_minitron.pruning.rounds import ROUNDS, compose
from nemo_minitron.pruning.scores import Scores
from nemo_minitron.pruning.slicing import prune_checkpoint
from nemo_minitron.pruning.targets import needed_scores, target_sizes
from nemo_minitron.runtime.agreement import from_first
from nemo_minitron.runtime.atomic import rename_folder
from nemo_minitron.runtime.console import progress
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import seen_by_all

log = logging.getLogger(__name__)

STATE = "state"
_BATCH_SIZES = ("micro_batch_size", "global_batch_size")


@dataclass(frozen=True)
class Calibrated:
    """Global scores, and what they took in this process.

    Attributes:
        scores: the same on every rank.
        tokens: tokens that went forward.
        seconds: in which they did.
    """

    scores: Scores
    tokens: int
    seconds: float

    def figures(self) -> dict[str, Any]:
        """Return the figures for ``metrics.json``."""
        return {
            "num_samples": self.scores.meta["num_samples"],
            "num_tokens": self.scores.meta["num_tokens"],
            "forward_tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.tokens / self.seconds, 1),
        }


def calibrate(
    folder: Path,
    data: DataConfig,
    parallel: ParallelConfig,
    scores: ScoreConfig,
    megatron: ForwardMegatronConfig,
    *,
    output_dir: str,
    work: Path,
    save_every: int,
) -> Calibrated:
    """Score a checkpoint on its data; collective, inside ``runtime.launch.distributed``.

    Args:
        folder: ``checkpoint/`` of a result.
        data: the calibration set.
        parallel: the initialised layout.
        scores: what to score and how.
        megatron: Megatron's own settings.
        output_dir: of the stage, for the cache of tokens.
        work: resumable folder, where ``state/`` is kept until the scores are there.
        save_every: samples between two saves of the state.
    """
    config = ModelConfig.load(folder)
    dataset = stage_dataset(data, config, folder, output_dir, filled=True)
    check_shared(dataset, data, config, parallel)
    groups = ParallelGroups.current()
    # CPUs have no fast path for half precision.
    dtype = DTYPES[config.dtype] if torch.cuda.is_available() else torch.float32
    chunks = load_frozen(folder, parallel, groups, dtype=dtype, megatron=megatron)
    layout = {**asdict(parallel), **{k: getattr(data, k) for k in _BATCH_SIZES}}
    saved = SavedState(work / STATE, save_every, layout, asdict(ParallelConfig()))
    passes = sum(forward_passes(config, scores, len(dataset)))
    start = time.perf_counter()
    with progress("scoring samples", passes) as advance:
        found = estimate_scores(chunks, config, groups, dataset, data, scores, advance, saved, work)
    seconds = time.perf_counter() - start
    saved.remove()
    found.meta["data"] = {
        key: getattr(data, key) for key in ("seq_length", "split", "split_name", "seed")
    }
    return Calibrated(found, (passes - saved.resumed) * data.seq_length, seconds)


def run_rounds(
    cfg: PruneConfig, config: ModelConfig, rounds: list[PruningConfig], work: Path
) -> tuple[Plan, list[dict[str, Any]]]:
    """Score, plan, prune, and again; collective, inside ``runtime.launch.distributed``.

    ``rounds/<n>/`` in ``work`` gets the scores and the plan of each round, both in terms of the
    model that the rounds before it left; a round whose scores are there is not scored again.

    Args:
        cfg: the stage.
        config: the model before pruning.
        rounds: see ``pruning.rounds.pruning_rounds``.
        work: working folder of the stage.

    Returns:
        The plan of all rounds together, in terms of the model before pruning; what every round cost
        (where it was scored here and now).
    """
    plan, costs = full_plan(config), []
    for number, one in enumerate(rounds, start=1):
        small = pruned_config(config, plan)
        sizes = target_sizes(small, one)
        log.info("round %d of %d: to %s", number, len(rounds), sizes)
        scores, figures = _scores(cfg, config, plan, one, work / ROUNDS, number)
        step = make_plan(small, one, scores)
        from_first(partial(_save_plan, step, work / ROUNDS / str(number)))
        plan = compose(plan, step)
        costs.append({"sizes": sizes, **figures})
    return plan, costs


def _scores(
    cfg: PruneConfig, config: ModelConfig, plan: Plan, one: PruningConfig, folder: Path, number: int
) -> tuple[Scores | None, dict[str, Any]]:
    """Return scores of the model that ``plan`` gives, from wherever they are."""
    small = pruned_config(config, plan)
    if number == 1 and cfg.importance is not None:
        return Scores.load(Path(cfg.importance)), {}
    if not needed_scores(small, one):
        return None, {}
    result, part = folder / str(number), folder / f"{number}.part"
    figures: dict[str, Any] = {}
    if not seen_by_all(result):
        figures = _score_here(cfg, config, plan, one, part, number)
        from_first(partial(_publish, part, result))
    check_seal(result, f"remove {result}, then the same command scores this round again")
    return Scores.load(result), figures


def _score_here(
    cfg: PruneConfig, config: ModelConfig, plan: Plan, one: PruningConfig, part: Path, number: int
) -> dict[str, Any]:
    """Calibrate on the model that ``plan`` gives; its scores are left in ``part``."""
    source = model = Path(cfg.checkpoint) / "checkpoint"
    if number > 1:
        model = part / "checkpoint"
        from_first(partial(_prune_anew, source, config, plan, model, cfg.workers))
    calibrated = calibrate(
        model,
        cfg.data,
        cfg.parallel,
        _what_to_score(cfg, pruned_config(config, plan), one),
        cfg.megatron,
        output_dir=cfg.output_dir,
        work=part,
        save_every=cfg.save_every_n_samples,
    )
    from_first(partial(_save_scores, calibrated.scores, part))
    return calibrated.figures()


def _save_plan(plan: Plan, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan.save(folder)


def _publish(part: Path, result: Path) -> None:
    seal(result, part)
    rename_folder(part, result)


def _prune_anew(source: Path, config: ModelConfig, plan: Plan, model: Path, workers: int) -> None:
    shutil.rmtree(model, ignore_errors=True)  # half a model, of a run that was killed
    model.parent.mkdir(parents=True, exist_ok=True)
    prune_checkpoint(source, config, plan, model, workers)


def _save_scores(scores: Scores, part: Path) -> None:
    part.mkdir(parents=True, exist_ok=True)
    scores.save(part)
    shutil.rmtree(part / "checkpoint", ignore_errors=True)


def _what_to_score(cfg: PruneConfig, small: ModelConfig, one: PruningConfig) -> ScoreConfig:
    """Return what a round needs scores of, and nothing else."""
    needed = needed_scores(small, one)
    dropped = small.num_layers - target_sizes(small, one)["num_layers"]
    axes = [axis for axis in score_axes() if axis in needed and axis != "layer"]
    blocks = dropped and one.layer_criterion in BLOCK_CRITERIA
    return ScoreConfig(
        **asdict(cfg.scores),
        axes=axes + (["layer"] if dropped else []),
        layer_criteria=[one.layer_criterion if dropped else "block_influence"],
        block_sizes=[dropped] if blocks else [],
    )

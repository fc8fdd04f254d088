"""``minitron pipeline``: a list of stages, each into a folder under ``output_dir``."""

import logging
import os
from pathlib import Path

from nemo_minitron.checkpoint.completion import write_manifest
from nemo_minitron.checkpoint.manifest import MANIFEST, fingerprint, read_manifest
from nemo_minitron.checkpoint.output_checks import check_apart, check_cache, check_neighbours
from nemo_minitron.config.stages import PipelineConfig
from nemo_minitron.pipeline.plan import Item, read_items, run_items
from nemo_minitron.planning.models import stated_model, warn_of_another_model
from nemo_minitron.reporting.rows import check_report
from nemo_minitron.runtime import ranks

log = logging.getLogger(__name__)


def check(cfg: PipelineConfig) -> None:
    """Compose and check every item, so that a mistake in the last one shows before the first runs.

    Raises:
        ValueError: unknown stages or keys, names taken twice, references to later items, inputs
            that do not exist, an output folder that belongs to something else, a report of
            evaluations that are not there.
    """
    if (ranks.launched_world_size() or 1) > 1:
        raise ValueError(
            "pipeline starts the ranks of its stages itself; start it once, without torchrun and "
            "with a single srun task"
        )
    output = Path(cfg.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir={output} is not a folder; set another output_dir")
    manifest = read_manifest(output)
    if manifest is not None and manifest.stage != "pipeline":
        raise ValueError(
            f"output_dir={output} holds a result of stage '{manifest.stage}'; set another "
            "output_dir"
        )
    items = read_items(cfg)
    outputs = [Path(item.config.output_dir).resolve() for item in items]
    for item in items:
        _check_nodes(item)
        _check_place(item, outputs)
    check_report(cfg)
    warn_of_another_model(items, stated_model(cfg))


def _check_place(item: Item, outputs: list[Path]) -> None:
    output = Path(item.config.output_dir).resolve()
    try:
        check_cache(item.config, outputs)
        check_apart(item.config, output)
        check_neighbours(item.config, output)
    except ValueError as error:
        raise ValueError(f"{item.name} ({item.stage}): {error}") from None


def _check_nodes(item: Item) -> None:
    """Refuse an item that is to run on several nodes, unless ``minitron submit`` has run it."""
    nodes = getattr(getattr(item.config, "trainer", None), "num_nodes", None) or 1
    if nodes > 1 and not (Path(item.config.output_dir) / MANIFEST).is_file():
        raise ValueError(
            f"{item.name}: trainer.num_nodes={nodes}, but a pipeline runs on one machine; queue "
            "its stages with `minitron submit pipeline ...`, or leave trainer.num_nodes out"
        )


def run(cfg: PipelineConfig) -> None:
    """Run what is not up to date, then write report.html, the final table and the manifest."""
    from nemo_minitron.reporting.report import write_report

    items = read_items(cfg)
    output = Path(cfg.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    run_items(cfg, items)
    results = {item.name: fingerprint(item.config.output_dir) for item in items}
    write_report(output, cfg)
    for item in items:
        if fingerprint(item.config.output_dir) != results[item.name]:
            raise ValueError(
                f"{item.name} ({item.stage}): {item.config.output_dir} was replaced while the "
                "report was written; run the same command again"
            )
    own = [name for name in sorted(os.listdir(output)) if name in ("report.html", "metrics.json")]
    write_manifest(cfg, "pipeline", output, results, own)

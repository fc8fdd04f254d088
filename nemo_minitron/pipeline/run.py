"""Runs the items of a pipeline, each in a process of its own, and skips what is up to date."""

import logging
import os
import shlex
from pathlib import Path

from nemo_minitron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    config_hash,
    fingerprint,
    open_result,
    stored_config,
)
from nemo_minitron.config import load
from nemo_minitron.config.identity import changes, input_paths, said
from nemo_minitron.config.stages import PipelineConfig, StageConfig
from nemo_minitron.pipeline.plan import Item
from nemo_minitron.runtime import ranks
from nemo_minitron.runtime.errors import (
    INTERRUPTED,
    PREEMPTED,
    TERMINATED,
    Interrupted,
    StageFailed,
)

log = logging.getLogger(__name__)


def run_items(cfg: PipelineConfig, items: list[Item]) -> None:
    """Run every item whose result is missing or stale, in order.

    Raises:
        StageFailed: an item failed, or stopped and can go on; later ones have not started.
    """
    for number, item in enumerate(items, start=1):
        title = f"[{number}/{len(items)}] {item.name} ({item.stage})"
        reason = "overwrite=true" if cfg.overwrite else stale(item)
        if reason is None:
            log.info("%s: up to date, skipped", title)
            continue
        log.info("%s: %s", title, reason)
        _run_item(item)


def stale(item: Item) -> str | None:
    """Why an item has to run; None when its result is of this config and of these inputs."""
    folder = Path(item.config.output_dir)
    if not (folder / MANIFEST).is_file():
        return "no result yet"
    try:
        manifest = open_result(folder, item.config.verify_inputs, workers=item.config.workers)
    except ValueError as error:
        return str(error)
    if manifest.stage != item.stage:
        return f"the folder holds a result of {manifest.stage}"
    changed = _changes(manifest, item.config)
    if changed:
        return f"its config changed ({changed})"
    paths = input_paths(item.config)
    for key in sorted({*paths, *manifest.inputs}):
        now = fingerprint(paths[key], item.config.workers) if key in paths else None
        if manifest.inputs.get(key) != now:
            return f"its input {key} changed"
    return None


def _changes(manifest: Manifest, config: StageConfig) -> str:
    """What of the config is not as it was when a result was made, in words; maybe nothing."""
    if manifest.config_hash == config_hash(config):
        return ""
    stored = stored_config(manifest)
    return "no config is stored" if stored is None else said(changes(config, stored))


def command(item: Item) -> list[str]:
    """Arguments of ``minitron`` that run an item, over a stale result too."""
    return [item.stage, *item.overrides, "overwrite=true", *load.config_flags()]


def _run_item(item: Item) -> None:
    arguments = command(item)
    log.info("minitron %s", shlex.join(arguments))
    try:
        ranks.run_minitron(arguments, ranks.alone(os.environ))
    except StageFailed as failure:
        if failure.code == INTERRUPTED:
            raise Interrupted from None
        # Its finished stages are the pipeline's saved work, also when this stage saves none.
        code = PREEMPTED if failure.code == TERMINATED else failure.code
        raise StageFailed(
            f"{item.name} ({item.stage}): {failure} [log: {item.config.output_dir}.log; finished "
            "stages are skipped when the pipeline runs again]",
            code,
        ) from None

"""The items of a pipeline: composed before anything runs, skipped if up to date, else run."""

import json
import logging
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_minitron import usage
from nemo_minitron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    config_hash,
    fingerprint,
    has_older_words,
    matching,
    open_result,
    stored_config,
)
from nemo_minitron.config import load
from nemo_minitron.config.identity import changes, input_paths, said
from nemo_minitron.config.schema import flatten
from nemo_minitron.config.stages import STAGE_CONFIGS, PipelineConfig, StageConfig
from nemo_minitron.documents import read_json
from nemo_minitron.runtime import ranks
from nemo_minitron.runtime.atomic import atomic_file
from nemo_minitron.runtime.errors import (
    INTERRUPTED,
    PREEMPTED,
    TERMINATED,
    Interrupted,
    StageFailed,
)

log = logging.getLogger(__name__)

_ANEW = ".overwritten.json"
"""Names the items that a SLURM job has run under overwrite=true, until all are done."""
_JOB = "SLURM_JOB_ID"

_ITEM_KEYS = {"name", "stage", "config"}
# Keys of the pipeline that hold for its items too, unless an item sets them itself.
_SHARED_KEYS = ("verify_inputs", "workers")


@dataclass(frozen=True)
class Item:
    """One stage of a pipeline.

    Attributes:
        name: its folder under the pipeline's output_dir.
        stage: what runs.
        overrides: its command line, less ``overwrite``.
        config: the same, composed.
        needs: names of the earlier items whose results it reads.
    """

    name: str
    stage: str
    overrides: tuple[str, ...]
    config: StageConfig
    needs: tuple[str, ...]


def read_items(cfg: PipelineConfig, *, at_hand: bool = True) -> list[Item]:
    """Compose every item.

    Args:
        cfg: the pipeline.
        at_hand: whether what comes from elsewhere has to exist.

    Raises:
        ValueError: names the item and what is wrong with it.
    """
    if not cfg.stages:
        raise ValueError("stages is empty; choose experiment=..., or list {name, stage, config}")
    items: list[Item] = []
    for index, raw in enumerate(cfg.stages):
        where = f"stages.{index} ({raw.get('name', 'no name')})"
        try:
            items.append(_read_item(cfg, raw, [item.name for item in items], at_hand))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
    names = [item.name for item in items]
    for name in cfg.change:
        if name not in names:
            hint = load.nearest(name, names)
            raise ValueError(
                f"change.{name} names no item of stages; "
                + (f"did you mean {hint}?" if hint else f"there are {', '.join(names)}")
            )
    return items


def _read_item(
    cfg: PipelineConfig, raw: dict[str, Any], earlier: Sequence[str], at_hand: bool
) -> Item:
    unknown = sorted(set(raw) - _ITEM_KEYS)
    if unknown:
        near = load.nearest(unknown[0], _ITEM_KEYS) or "config"
        raise ValueError(f"{unknown[0]} is not a key of an item; did you mean {near}?")
    name, stage = _name(raw, earlier), _stage(raw)
    config = raw.get("config") or {}
    if not isinstance(config, dict):
        raise ValueError(f"config={config} must be a dictionary of the keys of {stage}")
    changed = cfg.change.get(name) or {}
    if not isinstance(changed, dict):
        raise ValueError(f"change.{name}={changed} must be a dictionary of the keys of {stage}")
    # An empty dictionary would be flattened to a value.
    flat, wins = (flatten(part) if part else {} for part in (config, changed))
    # Hydra reads a file of a group, as in change.NAME.trainer=smoke, before all single keys.
    files = tuple(f"{key}." for key, value in wins.items() if isinstance(value, str))
    flat = {key: value for key, value in flat.items() if not key.startswith(files)}
    overrides = _overrides(cfg, name, {**flat, **wins})
    composed = load.compose(stage, overrides)
    needs = _needs(cfg, composed, earlier, at_hand)
    return Item(name, stage, tuple(overrides), composed, needs)


def _name(raw: dict[str, Any], earlier: Sequence[str]) -> str:
    name = str(raw.get("name") or "")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name):
        raise ValueError(f"name={name!r} must be a folder name of letters, digits, _ and -")
    if name.lower() in [other.lower() for other in earlier]:
        raise ValueError(f"name={name} is taken by an earlier item: both would write one folder")
    return name


def _stage(raw: dict[str, Any]) -> str:
    stage = str(raw.get("stage") or "")
    if stage not in STAGE_CONFIGS:
        raise ValueError(usage.unknown_stage(stage) if stage else "stage is missing")
    if stage == "pipeline":
        raise ValueError("stage=pipeline: a pipeline cannot hold another one; list its items here")
    if stage == "plan":
        raise ValueError("stage=plan makes no result; run minitron plan on the experiment instead")
    return stage


def _overrides(cfg: PipelineConfig, name: str, config: dict[str, Any]) -> list[str]:
    for key in ("output_dir", "overwrite"):
        if key in config:
            raise ValueError(f"{key} is set by the pipeline; remove it from the item's config")
    shared = {key: getattr(cfg, key) for key in _SHARED_KEYS}
    values = {**shared, **config, "output_dir": str(Path(cfg.output_dir) / name)}
    return [load.override(key, value) for key, value in values.items()]


def _needs(
    cfg: PipelineConfig, config: StageConfig, earlier: Sequence[str], at_hand: bool
) -> tuple[str, ...]:
    """Earlier items whose folders the inputs name. Inputs from elsewhere have to exist already."""
    root = Path(os.path.abspath(cfg.output_dir))
    needs = []
    for key, value in input_paths(config).items():
        path = Path(os.path.abspath(value))
        if root in path.parents:
            name = path.relative_to(root).parts[0]
            if name not in earlier:
                raise ValueError(
                    f"{key}={value} names '{name}', which is not an earlier item; earlier ones: "
                    f"{', '.join(earlier) or 'none'}"
                )
            needs.append(name)
        elif at_hand and not (path.exists() or Path(f"{path}.bin").exists() or matching(path)):
            raise ValueError(f"{key}={value} does not exist")
    return tuple(dict.fromkeys(needs))


# Keys (or sections) that are those of ``plan`` itself; all others are the stage's.
_OWN = (
    "cluster",
    "nodes",
    "mfu",
    "json",
    "model",
    "output_dir",
    "overwrite",
    "verify_inputs",
    "workers",
    "hydra",
)


def of_one_stage(stage: str, arguments: Sequence[str]) -> list[str]:
    """Return arguments of ``minitron plan`` that plan one stage.

    Args:
        stage: its name.
        arguments: keys of the stage and of ``plan``, and Hydra's flags.

    Raises:
        ValueError: a key of the stage is swept.
        HydraException: an override that does not parse.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.override_parser.overrides_parser import OverridesParser

    flags = get_args_parser().parse_intermixed_args(list(arguments))
    kept = [word for word in arguments if word not in flags.overrides]
    config = {}
    for override in OverridesParser.create().parse_overrides(load.opened(flags.overrides)):
        key = override.key_or_group
        if key.partition(".")[0].partition("/")[0] in _OWN:
            kept.append(str(override.input_line))
        elif override.is_sweep_override():
            raise ValueError(
                f"{override.input_line} sweeps a key of {stage}; plan sweeps its own keys alone, "
                "such as nodes"
            )
        else:
            config[key] = override.value()
    return [load.override("stages", [{"name": stage, "stage": stage, "config": config}]), *kept]


def run_items(cfg: PipelineConfig, items: list[Item]) -> None:
    """Run every item whose result is missing or stale, in order.

    Raises:
        StageFailed: an item failed, or stopped and can go on; later ones have not started.
    """
    note = Path(cfg.output_dir) / _ANEW
    done = _noted(note) if cfg.overwrite else []
    for number, item in enumerate(items, start=1):
        title = f"[{number}/{len(items)}] {item.name} ({item.stage})"
        anew = cfg.overwrite and item.name not in done
        reason = "overwrite=true" if anew else stale(item)
        if reason is None:
            log.info("%s: up to date, skipped", title)
            continue
        log.info("%s: %s", title, reason)
        try:
            _run_item(item)
        except StageFailed as failure:
            if failure.code not in (PREEMPTED, TERMINATED):
                note.unlink(missing_ok=True)
            raise
        if cfg.overwrite and _JOB in os.environ:
            done.append(item.name)
            with atomic_file(note) as draft:
                draft.write_text(json.dumps({"job": os.environ[_JOB], "done": done}))
    note.unlink(missing_ok=True)


def _noted(note: Path) -> list[str]:
    """Items that this SLURM job ran already under overwrite=true, before it was requeued."""
    try:
        found = read_json(note)
        return list(found["done"]) if found["job"] == os.environ.get(_JOB) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []


def stale(item: Item) -> str | None:
    """Return why an item has to run; None if its result is of this config and these inputs."""
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
        if not _is_input(manifest.inputs.get(key), paths.get(key), item.config.workers):
            return f"its input {key} changed"
    return None


def _is_input(identity: str | None, path: str | None, workers: int) -> bool:
    """Whether an input is unchanged since a result was made, by the hash of any version."""
    if path is None:
        return identity is None
    if fingerprint(path, workers) == identity:
        return True
    return has_older_words(path) and fingerprint(path, workers, earlier=True) == identity


def _changes(manifest: Manifest, config: StageConfig) -> str:
    """Describe how the config differs from the one that made a result; empty if it does not."""
    if manifest.config_hash == config_hash(config):
        return ""
    stored = stored_config(manifest)
    return "no config is stored" if stored is None else said(changes(config, stored))


def command(item: Item) -> list[str]:
    """Return arguments of ``minitron`` that run an item, over a stale result too."""
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

"""Hydra -> stage dataclass, strictly: one clear ``ValueError`` for whatever is wrong."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_minitron.config import schema
from nemo_minitron.config.axes import NEVER_PRUNED
from nemo_minitron.config.overrides import check_entry, refused_value, unreadable
from nemo_minitron.config.overrides import opened as opened
from nemo_minitron.config.overrides import override as override
from nemo_minitron.config.stages import StageConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.documents import refuse_too_much

T = TypeVar("T")


def register(stage: str) -> None:
    """Make the schema of a stage and the ``${stage:NAME}`` resolver known to Hydra (idempotent)."""
    schema.register_schema(stage)
    OmegaConf.register_new_resolver("stage", _stage_folder, replace=True)


def _stage_folder(name: str, _root_: DictConfig) -> str:
    """Return the folder of a pipeline item: ``${stage:NAME}``."""
    return f"{_root_.output_dir}/{name}"


def stage_config(stage: str, composed: DictConfig) -> StageConfig:
    """Turn a composed config into the stage's dataclass.

    Raises:
        ValueError: unknown keys, missing keys, wrong types, or values the dataclass refuses.
    """
    cls = schema.COMMANDS[stage]
    if stage == "plan":
        composed = _with_names_for_inputs(composed)
    try:
        typed = OmegaConf.merge(OmegaConf.structured(cls), composed)
        if OmegaConf.select(typed, "data.blend") is not None and OmegaConf.is_missing(
            typed.data, "path"
        ):
            typed.data.path = ""
        values = schema.flatten(OmegaConf.to_container(typed, resolve=False))
        missing = [key for key, value in values.items() if value == MISSING]
        if missing:
            needed = " ".join(f"{key}=..." for key in missing)
            raise ValueError(f"{stage} needs {', '.join(missing)}; add {needed}")
        cfg = cast(StageConfig, OmegaConf.to_object(typed))
    except OmegaConfBaseException as error:
        raise ValueError(explain(stage, error)) from error
    _take_row_length(getattr(cfg, "data", None))
    return cfg


def _take_row_length(data: object) -> None:
    """Take the length of samples from the rows of a ``.npy``, if ``data.seq_length`` is not set."""
    if not isinstance(data, DataConfig) or data.seq_length != DataConfig.seq_length:
        return
    path = Path(data.path or "")
    if path.suffix == ".npy" and path.is_file():
        import numpy as np

        with contextlib.suppress(Exception):  # data/checks.py says what is wrong with it
            rows = np.load(path, mmap_mode="r", allow_pickle=False)
            data.seq_length = max(rows.shape[-1], 1) if rows.ndim == 2 else data.seq_length


def _with_names_for_inputs(composed: DictConfig) -> DictConfig:
    """Let a name stand for each open one of the ``inputs``, so that it can be planned."""
    names = [name for name in composed.inputs if OmegaConf.is_missing(composed.inputs, name)]
    known = {"inputs": {name: f"<inputs.{name}>" for name in names}}
    return cast(DictConfig, OmegaConf.merge(composed, known))


def read_section(cls: type[T], values: DictConfig | dict[str, Any]) -> T:
    """Return one section of a NeMo model's config as its dataclass, nested ones included."""
    return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values)))


def compose(stage: str, overrides: Sequence[str], config_dir: str | None = None) -> StageConfig:
    """Compose a stage as the command line does, with the config folders now in force.

    Args:
        stage: name of the stage.
        overrides: as on the command line.
        config_dir: the user's own one among those folders.

    Raises:
        ValueError: as ``check_overrides`` and ``stage_config``.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException

    register(stage)
    try:
        overrides = opened([*overrides, *searchpath()])
        check_overrides(stage, overrides, config_dir)
        if GlobalHydra.instance().is_initialized():
            composed = hydra_compose(config_name=stage, overrides=list(overrides))
        else:
            with initialize_config_dir(str(schema.conf_dir()), version_base="1.3"):
                composed = hydra_compose(config_name=stage, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(stage, error)) from error
    return stage_config(stage, composed)


@contextlib.contextmanager
def hydra_for(config_dir: str | None) -> Iterator[None]:
    """Hydra with the shipped config files and the user's own, as for a command line."""
    from hydra import initialize_config_dir
    from hydra._internal.hydra import Hydra
    from hydra._internal.utils import create_config_search_path
    from hydra.core.config_search_path import SearchPathQuery
    from hydra.core.global_hydra import GlobalHydra

    if config_dir and not Path(config_dir).is_dir():
        raise ValueError(f"--config-dir {config_dir} is not a folder")
    with initialize_config_dir(str(schema.conf_dir()), version_base="1.3"):
        if config_dir:
            places = create_config_search_path(str(schema.conf_dir()))
            own = f"file://{Path(config_dir).resolve()}"
            places.prepend("command-line", own, SearchPathQuery(provider="schema"))
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2("minitron", places)
        yield


_MOST_BRACKETS = 1000
"""Maximum number of brackets in an override."""
_DEEPEST = 40
"""Maximum depth of brackets; above 100 Hydra and OmegaConf end in Python's recursion limit."""


def check_overrides(stage: str, overrides: Iterable[str], config_dir: str | None = None) -> None:
    """Refuse keys that the stage does not have, before Hydra composes anything.

    Args:
        stage: name of the stage.
        overrides: as on the command line.
        config_dir: the user's own config folder, whose groups are known too.

    Raises:
        ValueError: names the key and the nearest one there is.
        HydraException: an override that does not parse.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = list(overrides)
    for text in overrides:
        if sum(text.count(bracket) for bracket in "[{(") > _MOST_BRACKETS:
            raise ValueError(f"{text[:40]}... has more than {_MOST_BRACKETS} brackets")
        if _depth(text) > _DEEPEST:
            raise ValueError(f"{text[:40]}... is nested more than {_DEEPEST} deep")
    known_groups = {*groups(stage), *_folders(config_dir)}
    _check_files(config_dir, known_groups)
    for parsed in OverridesParser.create().parse_overrides(overrides):
        key = parsed.key_or_group
        if key in known_groups and not parsed.is_delete():
            check_entry(key, parsed.value())
        grouped = "/" in key or parsed.package is not None or key in known_groups
        if not grouped and key.split(".")[0] != "hydra":
            _check_key(stage, key)


def _depth(override: str) -> int:
    """Return how many brackets are open at once in the text of an override."""
    depth = deepest = 0
    for letter in override:
        depth += (letter in "[{(") - (letter in "]})")
        deepest = max(deepest, depth)
    return deepest


def _check_files(config_dir: str | None, known_groups: Iterable[str]) -> None:
    """Refuse config files of the user that would keep Hydra busy for ever."""
    for folder in ("", *sorted(known_groups)) if config_dir else ():
        for path in sorted((Path(str(config_dir)) / folder).glob("*.yaml")):
            refuse_too_much(path)


def _folders(config_dir: str | None) -> list[str]:
    return [path.name for path in Path(config_dir).glob("*/")] if config_dir else []


def groups(stage: str, config_dir: str | None = None) -> dict[str, list[str]]:
    """Config group -> its entries, for the groups a stage takes: shipped ones, and the user's own.

    Of experiments those alone that set nothing which the stage does not have.
    """
    conf = schema.conf_dir()
    folders = [conf, *([Path(config_dir)] if config_dir else [])]
    defaults = yaml.safe_load((conf / f"{stage}.yaml").read_text())["defaults"]
    names = [next(iter(entry)) for entry in defaults if isinstance(entry, dict)]
    found = {}
    for name in [name for name in names if not name.startswith("override ")]:
        files = [path for folder in folders for path in (folder / name).glob("*.yaml")]
        fits = [path for path in files if name != "experiment" or _fits(stage, path, names)]
        found[name] = sorted({path.stem for path in fits})
    return found


def _fits(stage: str, experiment: Path, names: Sequence[str]) -> bool:
    """Whether an experiment sets only sections and groups that the stage has."""
    text = experiment.read_text(errors="replace")
    sections = set(re.findall(r"^(\w+):", text, re.MULTILINE)) - {"defaults"}
    overridden = set(re.findall(r"^\s*- override /(\w+):", text, re.MULTILINE))
    known = {key.name.partition(".")[0] for key in schema.keys(schema.COMMANDS[stage])}
    return sections <= known and overridden <= {*names}


def _check_key(stage: str, key: str) -> None:
    named = re.match(r"stages\.(?!\d+(?:\.|$))([^.]+)(?:\.config)?(\..+)?", key)
    if named and stage in ("pipeline", "plan"):
        name, rest = named.group(1), named.group(2) or ".KEY"
        raise ValueError(
            f"{key}: stages is a list, whose items have numbers from 0; write +change.{name}{rest}"
            "=... to change a key of the item of that name"
        )
    known = [k.name for k in schema.keys(schema.COMMANDS[stage])]
    inside = any(name == key or name.startswith(key + ".") for name in known)
    if not inside and not _open_section(stage, key):
        raise ValueError(unknown_key(stage, key))


def _open_section(stage: str, key: str) -> bool:
    """Whether the key lies in a free-form dictionary or list (``inputs``, ``stages``, ...)."""
    return any(
        key.startswith(k.name + ".") and k.type.startswith(("dict", "list[dict"))
        for k in schema.keys(schema.COMMANDS[stage])
    )


def unknown_key(stage: str, key: str) -> str:
    """Return the message for a key that the stage does not have."""
    key = key.replace("[", ".").replace("]", "")  # stages[0].x, as OmegaConf writes it
    if _open_section(stage, key):
        return f"{key} is not in the config files chosen; write +{key}=... to add it"
    why = NEVER_PRUNED.get(key.removeprefix("pruning.target."))
    if why is not None:
        return f"{key} is not a size that can be pruned: {why}; leave it out"
    known = [k.name for k in schema.keys(schema.COMMANDS[stage])]
    near = nearest(key, known)
    # A key given without its section ("hidden_size") is near to nothing, but easy to place.
    near = near or next((k for k in known if k.rpartition(".")[2] == key.rpartition(".")[2]), None)
    hint = f"did you mean {near}?" if near else f"see minitron {stage} --help"
    return f"{key} is not a key of {stage}; {hint}"


def searchpath() -> list[str]:
    """The override that gives another config the ``hydra.searchpath`` of this one; maybe none."""
    from hydra.core.hydra_config import HydraConfig

    places = list(HydraConfig.get().searchpath) if HydraConfig.initialized() else []
    return [override("hydra.searchpath", places)] if places else []


def config_flags() -> list[str]:
    """Return arguments that give another ``minitron`` the config folders of this one."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    flags = searchpath()
    for source in HydraConfig.get().runtime.config_sources:
        if source.provider == "command-line":
            flags += ["--config-dir", str(source.path)]
        if source.provider == "main" and source.path != str(schema.conf_dir()):
            flags += ["--config-path", str(source.path)]
    return flags


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word most like ``word``, if any is."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)), None)


def explain(stage: str, error: Exception) -> str:
    """Return one line for an error of Hydra or OmegaConf."""
    from hydra.errors import OverrideParseException

    if isinstance(error, OverrideParseException):
        return unreadable(error.override, _first_line(error))
    if str(error).startswith("Ambiguous value"):  # a,b without --multirun
        return " ".join(line.strip() for line in str(error).splitlines())
    behind = error.__cause__ or error.__context__
    cause = behind if isinstance(behind, OmegaConfBaseException) else error
    full_key = getattr(cause, "full_key", None) or getattr(error, "full_key", None)
    text = _first_line(cause)
    if full_key and re.search(r"Key '.*' (is not in struct|not in )", text):
        where = re.match(r"In '(.+?)':", str(error))
        return (f"conf/{where.group(1)}.yaml: " if where else "") + unknown_key(stage, full_key)
    foreign = re.match(r"In '(.+?)': Could not override '(.+?)'", str(error))
    if foreign:
        file, group = foreign.groups()
        return (
            f"conf/{file}.yaml sets {group}=, which {stage} does not have: it is for another stage "
            "(those of experiment/ for minitron pipeline and plan)"
        )
    options = re.search(r"Available options in '(\S+)':\n((?:\t.*\n?)+)", str(error))
    if options:
        group, names = options.group(1), options.group(2).split()
        return f"{_first_line(error)}; {group}= is one of {', '.join(names)}"
    unset = re.search(r"Environment variable '(.+)' not found", text)
    if unset:
        name = unset.group(1)
        text = (
            f"{name} is not set in the environment; export it, or write ${{oc.env:{name},DEFAULT}}"
        )
    if full_key:
        return refused_value(full_key, getattr(cause, "value", None), text)
    return text if cause is error else f"{_first_line(error)}: {text}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__

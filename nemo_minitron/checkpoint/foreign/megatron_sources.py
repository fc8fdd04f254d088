"""Find the parts of checkpoints of Megatron-LM, Megatron-Bridge, NeMo 2 and NeMo 1.

``LAYOUTS`` says of each kind how it is recognised; a function per kind says where its config,
weights and tokenizer lie. No code of a checkpoint runs. What these programs write is in
Megatron-LM's megatron/training/checkpointing.py, Megatron-Bridge's training/checkpointing.py, and
NeMo's lightning/io/pl.py and collections/nlp/parts/nlp_overrides.py.
"""

import logging
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from nemo_minitron.checkpoint.foreign.megatron_stated import Stated, of_args, of_core, of_nemo1
from nemo_minitron.checkpoint.inside import inside, is_inside
from nemo_minitron.checkpoint.parts import Find, Part, archive_parts, below, in_folder
from nemo_minitron.checkpoint.tokenizer import TokenizerFiles, tokenizer_files
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.documents import JsonObject, read_json_object, yaml_value

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
RUN_CONFIG = "run_config.yaml"
NEMO1_CONFIG = "model_config.yaml"
COMMON = "common.pt"
_LEGACY = re.compile(r"(mp_rank|tp_rank)_\d\d")
_TO_TORCH_DIST = (
    "load it with Megatron-LM once more and save it with --ckpt-convert-format torch_dist "
    "--ckpt-convert-save FOLDER, then set source to FOLDER (it lies in FOLDER/torch_dist)"
)


@dataclass(frozen=True)
class Source:
    """Where the parts of a checkpoint are.

    Attributes:
        where: what the user gave, resolved to one iteration.
        stated: what its config says.
        weights: folder of the ``torch_dist`` checkpoint, for messages.
        find: looks files in ``weights`` up.
        single: the one ``model_weights.ckpt`` that there is instead.
        tokenizer: its files.
        vocab_size: true vocabulary if the config says so.
        config: the whole of it, where ``MinitronGPTModel.save_to`` wrote the archive.
        generation: generation_config.json.
    """

    where: Path
    stated: Stated
    weights: Path
    find: Find
    single: Part | None = None
    tokenizer: TokenizerFiles = field(default_factory=dict)
    vocab_size: int | None = None
    config: ModelConfig | None = None
    generation: JsonObject = field(default_factory=dict)


def _yaml(part: Part | None, where: Path) -> JsonObject:
    if part is None:
        raise ValueError(f"{where} is missing")
    try:
        value = yaml_value(part.read())
    except ValueError as error:
        raise ValueError(f"{where} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} must hold a mapping")
    return value


def _mapping(value: object) -> JsonObject:
    """Return a section of a config; empty where the config has no section of that name."""
    return value if isinstance(value, dict) else {}


# ---------------------------------------------------------------- Megatron-LM and Megatron-Bridge


def iteration_folder(path: Path) -> Path:
    """Return the folder of one iteration, of which a checkpoint folder may hold several.

    Raises:
        ValueError: the tracker names one that is not there, or nothing says which one to take.
    """
    folders = sorted(p.name for p in path.glob("iter_*") if p.is_dir())
    tracker = path / TRACKER
    if not tracker.is_file():
        if len(folders) <= 1:
            return path / folders[0] if folders else path
        raise ValueError(
            f"{path} holds {', '.join(folders)} but no {TRACKER}; set source to one of them"
        )
    text = tracker.read_text().strip()
    if text != "release" and not re.fullmatch(r"[0-9]{1,18}", text):
        raise ValueError(f"{tracker} holds {text!r}, not an iteration or 'release'")
    folder = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not folder.is_dir():
        there = ", ".join(folders) or "no iteration"
        raise ValueError(
            f"{tracker} names {folder.name}, which is missing ({path} holds {there}); set source "
            "to the folder of one iteration"
        )
    return folder


def _refuse_other_formats(folder: Path) -> None:
    legacy = sorted(p.name for p in folder.iterdir() if _LEGACY.fullmatch(p.name))
    if legacy:
        raise ValueError(
            f"{folder} holds {legacy[0]}: Megatron's legacy format 'torch', cut for one layout; "
            f"{_TO_TORCH_DIST}"
        )
    if (folder / ".metadata").is_file() and not (folder / "metadata.json").is_file():
        raise ValueError(
            f"{folder} has no metadata.json: --ckpt-format torch_dcp or fsdp_dtensor, not "
            f"torch_dist; {_TO_TORCH_DIST}"
        )


def _megatron_lm(path: Path) -> Source:
    from nemo_minitron.checkpoint.common_state import read_common  # a second

    folder = iteration_folder(path)
    _refuse_other_formats(folder)
    file, common = read_common(folder, in_folder(folder))
    args = common.get("args")
    if not isinstance(args, Namespace):
        raise ValueError(
            f"{file} lacks args, the settings that Megatron-LM saves with a model; set source to a "
            "checkpoint of its training (or of Megatron-Bridge or NeMo, which have config files)"
        )
    said = vars(args)
    stated, older = of_args(said, f"args in {file}"), "null_tokenizer_eod_id" not in said
    return Source(
        folder,
        stated,
        folder,
        in_folder(folder),
        tokenizer=_named_tokenizer(folder, said.get("tokenizer_model"), file),
        vocab_size=stated.null_vocabulary(before_core_0_18=older),
    )


def _tokenizer_inside(folder: Path, named: object) -> TokenizerFiles:
    """Return the tokenizer that a config names, where it lies in the checkpoint's own folder."""
    if not isinstance(named, str) or not is_inside(named):
        return {}
    return tokenizer_files(inside(folder, named))


def _named_tokenizer(folder: Path, named: object, where: object) -> TokenizerFiles:
    """Call ``_tokenizer_inside`` and warn if a tokenizer is named but not read."""
    files = _tokenizer_inside(folder, named)
    if named and isinstance(named, str) and not files:
        logger.warning(
            f"{where} names the tokenizer {named}, which is not taken from outside the checkpoint; "
            f"if it is right, set tokenizer={named}"
        )
    return files


def _generation(model: JsonObject) -> JsonObject:
    found = _mapping(_mapping(model.get("generation_config")).get("config_dict"))
    return {key: value for key, value in found.items() if value is not None}


def _bridge(path: Path) -> Source:
    folder = iteration_folder(path)
    _refuse_other_formats(folder)
    file = folder / RUN_CONFIG
    said = _yaml(in_folder(folder)(RUN_CONFIG), file)
    model, tokenizer = said.get("model"), _mapping(said.get("tokenizer")).get("tokenizer_model")
    if not isinstance(model, dict):
        raise ValueError(f"{file} lacks model")
    files = _tokenizer_inside(folder, "tokenizer")
    return Source(
        folder,
        of_core(model, f"model in {file}"),
        folder,
        in_folder(folder),
        tokenizer=files or _named_tokenizer(folder, tokenizer, file),
        vocab_size=model.get("vocab_size"),
        generation=_generation(model),
    )


# ---------------------------------------------------------------- NeMo


def _nemo2_tokenizer(context: Path, stated: object) -> TokenizerFiles:
    """Return the file or folder that model.yaml names, relative to itself; else any that exists."""
    for key in ("pretrained_model_name", "model_path", "tokenizer_model"):
        if files := _tokenizer_inside(context, _mapping(stated).get(key)):
            return files
    folders = sorted(path.name for path in context.iterdir() if path.is_dir())
    for name in ("nemo_tokenizer", *folders):
        if files := _tokenizer_inside(context, name):
            return files
    return tokenizer_files(context)


def _nemo2(path: Path) -> Source:
    root = path.parent if path.name == "weights" and path.is_dir() else path
    context, weights = root / "context", root / "weights"
    file = context / "model.yaml"
    if not weights.is_dir():
        raise ValueError(f"{weights} is missing: {root} is half of a NeMo 2 checkpoint")
    model = _yaml(in_folder(context)("model.yaml"), file)
    config = model.get("config")
    if not isinstance(config, dict):
        raise ValueError(f"{file} lacks config")
    generation = in_folder(context)("artifacts/generation_config.json")
    return Source(
        root,
        of_core(config, f"config in {file}"),
        weights,
        in_folder(weights),
        tokenizer=_nemo2_tokenizer(context, model.get("tokenizer")),
        vocab_size=config.get("vocab_size"),
        generation=read_json_object(generation.path) if generation else {},
    )


# Key in the tokenizer section of model_config.yaml -> what its file is called elsewhere.
_NEMO1_FILES = {"model": "tokenizer.model", "vocab_file": "vocab.json", "merge_file": "merges.txt"}


def _nemo1_tokenizer(find: Find, stated: object) -> TokenizerFiles:
    if not isinstance(stated, dict) or stated.get("additional_special_tokens"):
        return {}
    if stated.get("sentencepiece_legacy") and stated.get("special_tokens"):
        return {}  # more tokens than its file has
    files: TokenizerFiles = {}
    for key, name in _NEMO1_FILES.items():
        value = stated.get(key)
        # "nemo:NAME", or the path it was copied from
        own = Path(value.removeprefix("nemo:")).name if isinstance(value, str) else ""
        part = find(own) if own else None
        if part is not None:
            files["tokenizer.json" if key == "model" and own.endswith(".json") else name] = part
    return files


def _own_archive(path: Path, find: Find, within: Find, config: JsonObject) -> Source:
    """Open an archive that ``MinitronGPTModel.save_to`` wrote."""
    files: TokenizerFiles = {}
    for name in _mapping(config.get("tokenizer")).values():
        unique = Path(str(name).removeprefix("nemo:")).name
        part, plain = find(unique), unique.partition("_")[2]
        if part is not None and is_inside(plain):  # NeMo puts 32 hexadecimal digits before it
            files[plain] = part
    where = str(path / NEMO1_CONFIG)
    try:
        own = ModelConfig(**config["gpt"])
    except TypeError as error:
        raise ValueError(f"{where}: gpt is not a config of a model: {error}") from error
    return Source(
        path,
        Stated(where, {}),
        path / "model_weights",
        within,
        tokenizer=files,
        config=own,
        vocab_size=own.vocab_size,
    )


def _nemo1(path: Path) -> Source:
    parts = archive_parts(path) if path.is_file() else None
    find = in_folder(path) if parts is None else parts.get
    config = _yaml(find(NEMO1_CONFIG), path / NEMO1_CONFIG)
    names = [p.name for p in path.iterdir()] if parts is None else [p.split("/")[0] for p in parts]
    legacy = sorted(name for name in names if _LEGACY.fullmatch(name))
    if legacy:
        raise ValueError(
            f"{path} holds {legacy[0]}, weights cut for one layout; open it in NeMo and save it "
            "with distributed checkpoints, or with TP=1 and PP=1"
        )
    within = in_folder(path / "model_weights") if parts is None else below(parts, "model_weights")
    if "gpt" in config:
        return _own_archive(path, find, within, config)
    return Source(
        path,
        of_nemo1(config, str(path / NEMO1_CONFIG)),
        path / "model_weights",
        within,
        single=None if within("metadata.json") else find("model_weights.ckpt"),
        tokenizer=_nemo1_tokenizer(find, config.get("tokenizer")),
        vocab_size=config.get("override_vocab_size"),
    )


# ---------------------------------------------------------------- which one it is


def _has(*names: str) -> Callable[[Path], bool]:
    return lambda path: all((path / name).exists() for name in names)


def _is_megatron_lm(path: Path) -> bool:
    folders = [path, *path.glob("iter_*"), path / "release"]
    if len(folders) > 2 or (path / TRACKER).is_file():
        return True
    names = {p.name for folder in folders if folder.is_dir() for p in folder.iterdir()}
    return not names.isdisjoint((COMMON, ".metadata")) or any(map(_LEGACY.fullmatch, names))


def _is_bridge(path: Path) -> bool:
    return any((folder / RUN_CONFIG).is_file() for folder in (path, *path.glob("iter_*")))


# In this order: name, what a folder of this kind looks like, how it is opened.
LAYOUTS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path], Source]], ...] = (
    ("NeMo 2", lambda p: _has("context")(p) or _has("../context", "metadata.json")(p), _nemo2),
    ("NeMo 1", _has(NEMO1_CONFIG), _nemo1),
    ("Megatron-Bridge", _is_bridge, _bridge),
    ("Megatron-LM", _is_megatron_lm, _megatron_lm),
)


def _converted(path: Path) -> Path:
    """``--ckpt-convert-save`` puts what it converts into a folder of the folder it is given."""
    inside = path / "torch_dist"
    return inside if (inside / TRACKER).is_file() and not (path / TRACKER).exists() else path


def is_megatron(path: Path) -> bool:
    """Whether this is a checkpoint of any of ``LAYOUTS``, or a ``.nemo`` archive."""
    if path.is_file():
        return path.suffix == ".nemo"
    path = _converted(path)
    return any(matches(path) for _, matches, _ in LAYOUTS)


def find_source(path: Path) -> Source:
    """Find the parts of a checkpoint and read its config.

    Raises:
        ValueError: a file is missing, damaged or of another format.
    """
    if path.is_file():
        return _nemo1(path)
    path = _converted(path)
    return next(find(path) for _, matches, find in LAYOUTS if matches(path))

"""The arguments of a training run as overrides of this package, and what has no key here.

Needs no torch: names of fields are read in the source of the installed Megatron-Core.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from nemo_minitron.checkpoint.foreign import argument_tables as tables
from nemo_minitron.checkpoint.foreign.argument_list import Given
from nemo_minitron.checkpoint.foreign.argument_model import read_model
from nemo_minitron.config.base import WORDS
from nemo_minitron.config.layout import check_layout
from nemo_minitron.config.load import override
from nemo_minitron.config.megatron import PARTS
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig, OptimConfig, TrainerConfig
from nemo_minitron.documents import JsonObject
from nemo_minitron.runtime.megatron_source import fields_in_source, installed_version

_SECTIONS = {
    "parallel": ParallelConfig,
    "data": DataConfig,
    "trainer": TrainerConfig,
    "optim": OptimConfig,
}
_PAIRS = (
    ("bf16", "fp16"),
    ("train_iters", "train_samples"),
    ("lr_warmup_iters", "lr_warmup_fraction"),
    ("lr_warmup_iters", "lr_warmup_samples"),
    ("swiglu", "squared_relu"),
    ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank"),
)
"""Arguments that say two things of one, where both are given."""


@dataclass
class Taken:
    """Keys and values, and what was not taken over: its name -> why."""

    keys: JsonObject = field(default_factory=dict)
    model: JsonObject = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Overrides as Hydra reads them; those of the model are new to its config."""
        sections = [*_SECTIONS, "megatron"]
        for key in sorted(self.keys, key=lambda key: sections.index(key.partition(".")[0])):
            plain = key == "data.split"  # needs no quotes, neither of Hydra nor of the shell
            yield f"{key}={self.keys[key]}" if plain else override(key, self.keys[key])
        for key, value in self.model.items():
            yield override(f"+model.{key}", value)

    def comments(self) -> Iterator[str]:
        """List what was not taken over, one line each."""
        yield from (f"{name}: {why}" for name, why in self.left.items())
        yield from self.notes


def take(given: Given) -> Taken:
    """Translate what was given.

    Raises:
        ValueError: values that contradict each other, by name.
    """
    taken = Taken(left=dict(given.left))
    for one, other in _PAIRS:
        if given.values.get(one) and given.values.get(other):
            raise ValueError(
                f"{given.name(one)} and {given.name(other)} contradict each other; leave one out"
            )
    values = _with_defaults(given)
    _take_steps(given, values, taken)
    for name, value in values.items():
        _take_one(given, name, value, taken)
    model = read_model(given)
    for name in model.read:
        if name in given.values:
            taken.left.pop(given.name(name), None)
    taken.left |= model.left
    taken.model, taken.notes = model.keys(), [model.note] if model.note else []
    _check(given, taken, model.config)
    return taken


def _with_defaults(given: Given) -> JsonObject:
    """The values, with what Megatron-LM does where nothing is said and this package does not."""
    values = dict(given.values)
    for name, defaults in tables.DEFAULTS.items() if given.bridge is None else ():
        if name in values:
            values = {**defaults, **values}
    if given.bridge is None and "train_iters" in values:
        values.setdefault("save_interval", 0)
    return values


def _number(given: Given, values: Mapping[str, object], name: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{given.name(name)}={value} must be a number")
    return value


def _take_steps(given: Given, values: JsonObject, taken: Taken) -> None:
    """Take keys that depend on several arguments: steps, warm-up, precision, chunks, replicas."""
    batch = values.get("global_batch_size")
    if values.get("train_samples") and batch:
        values["train_iters"] = int(_number(given, values, "train_samples") // batch)
    steps = values.get("train_iters")
    decay = values.get("lr_decay_iters") or steps
    if values.get("lr_decay_samples") and batch:
        decay = int(_number(given, values, "lr_decay_samples") // batch)
    if values.get("lr_warmup_fraction") and decay:
        fraction = _number(given, values, "lr_warmup_fraction")
        values["lr_warmup_iters"] = round(fraction * decay)
    elif values.get("lr_warmup_samples") and batch:
        values["lr_warmup_iters"] = int(_number(given, values, "lr_warmup_samples") // batch)
    if decay != steps:
        name = given.name("lr_decay_iters" if "lr_decay_iters" in values else "lr_decay_samples")
        taken.left[name] = f"{decay} steps: the rate falls over all of trainer.max_steps here"
    if values.get("fp16"):
        taken.left[given.name("fp16")] = "trainer.precision is 32 or bf16-mixed"
    if values.get("bf16"):
        taken.keys["trainer.precision"] = "bf16-mixed"
    if values.get("recompute_activations"):
        values.setdefault("recompute_granularity", "selective")
    if values.get("recompute_granularity") != "selective":
        unread = values.pop("recompute_modules", None)
        if unread and given.bridge is None:
            name = given.name("recompute_modules")
            taken.left[name] = "read with --recompute-granularity selective alone"
    _take_layout(given, values, taken)


def _take_layout(given: Given, values: JsonObject, taken: Taken) -> None:
    tp, pp = (
        int(_number(given, {name: values.get(name, 1)}, name))
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size")
    )
    each = values.get("num_layers_per_virtual_pipeline_stage")
    if each:
        layers = int(_number(given, values, "num_layers"))
        if layers % (pp * each):
            raise ValueError(
                f"{given.name('num_layers')}={layers} must be a multiple of "
                f"{given.name('pipeline_model_parallel_size')}={pp} x "
                f"{given.name('num_layers_per_virtual_pipeline_stage')}={each}"
            )
        values["virtual_pipeline_model_parallel_size"] = layers // pp // each
        if layers == pp * each:
            del values["virtual_pipeline_model_parallel_size"]
    if tp == 1 and values.pop("sequence_parallel", False):
        taken.left[given.name("sequence_parallel")] = (
            f"Megatron switches it off where {given.name('tensor_model_parallel_size')} is 1"
        )
    ranks = values.get("nproc_per_node"), values.get("nnodes", 1)
    if all(isinstance(number, int) for number in ranks):
        world, one = ranks[0] * ranks[1], tp * pp * int(values.get("context_parallel_size", 1))
        if world % one:
            raise ValueError(
                f"{world} ranks (--nproc_per_node x --nnodes) are not a multiple of tensor x "
                f"pipeline x context parallel ranks, {one}; change one of them"
            )
        taken.keys["parallel.data_parallel_size"] = world // one
        _check_batch(given, values, world // one)


def _check_batch(given: Given, values: JsonObject, replicas: int) -> None:
    batch, micro = values.get("global_batch_size"), values.get("micro_batch_size")
    if isinstance(batch, int) and isinstance(micro, int) and batch % (micro * replicas):
        raise ValueError(
            f"{given.name('global_batch_size')}={batch} must be a multiple of "
            f"{given.name('micro_batch_size')}={micro} x {replicas} data-parallel ranks"
        )


def _take_one(given: Given, name: str, value: object, taken: Taken) -> None:
    said = given.name(name)
    if value is None or name in tables.QUIET:
        return
    if name in tables.KEYS:
        _take_key(given, name, value, taken)
    elif found := tables.FIELDS.get(name) or _field(name, value):
        target, fixed = found
        part, _, own = target.partition(".")
        if given.bridge is not None and _at_default(part, own, value):
            return
        _take_field(part, own, value if fixed is None else fixed, said, taken)
    elif given.bridge is None or value not in (False, [], {}):
        taken.left[said] = _reason(given, name)


def _at_default(part: str, name: str, value: object) -> bool:
    """Whether a value is Megatron's default, or a nested object that no key here stands for."""
    default = fields_in_source(part).get(name, ("", ...))[1]
    return value == default or isinstance(value, dict) or (not value and default in (None, ...))


def _take_key(given: Given, name: str, value: object, taken: Taken) -> None:
    for key in tables.KEYS[name]:
        section, _, own = key.partition(".")
        known = next(f for f in fields(_SECTIONS[section]) if f.name == own)
        if known.type in (int, float):
            _number(given, {name: value}, name)
        words = known.metadata.get(WORDS)
        if words and str(value).lower() not in words:
            taken.left[given.name(name)] = f"{value} is not one of {', '.join(words)} ({key})"
            continue
        if key == "data.split" and isinstance(value, str | list):
            value = value if isinstance(value, str) else ",".join(map(str, value))
            value = "/".join(part.strip() for part in value.split(","))
        if key == "data.path" and isinstance(value, list):
            taken.left[given.name(name)] = f"{len(value)} words: give one prefix as data.path"
            continue
        if own in ("recompute_modules",) and not isinstance(value, list):
            value = [value]
        taken.keys[key] = value


def _field(name: str, value: object) -> tuple[str, object] | None:
    """``part.field`` of Megatron's dataclasses that an argument sets, and what a flag means."""
    off = name.removeprefix("no_").removeprefix("disable_")
    for part in PARTS:
        known = fields_in_source(part)
        if name in known:
            return f"{part}.{name}", [value] if _wants_list(known[name][0], value) else None
        if off != name and off in known:
            return f"{part}.{off}", False
    return None


def _wants_list(annotation: str, value: object) -> bool:
    return annotation.removeprefix("Optional[").lower().startswith("list[") and not isinstance(
        value, list
    )


def _take_field(part: str, name: str, value: object, said: str, taken: Taken) -> None:
    owner = PARTS[part].get(name)
    if owner is not None:
        taken.left[said] = f"{name} is set by {owner}"
    elif name in fields_in_source(part):
        taken.keys[f"megatron.{part}.{name}"] = value
    else:
        taken.left[said] = (
            f"the installed megatron-core {installed_version()} has no {name}: an argument of "
            "another version"
        )


def _reason(given: Given, name: str) -> str:
    if name in tables.REASONS:
        return tables.REASONS[name]
    if name in tables.OTHER_VERSIONS:
        return f"of another version of Megatron-LM: {tables.OTHER_VERSIONS[name]}"
    for part, owned in PARTS.items():
        if name in owned:
            return (
                f"of another version of Megatron-Core than {installed_version()} "
                f"({part}); {name} is set by {owned[name]}"
            )
    if given.bridge is not None:
        return "no key here"
    known = [*tables.KEYS, *tables.FIELDS, *tables.MODEL, *tables.QUIET, *tables.REASONS]
    known += [own for part in PARTS for own in fields_in_source(part)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    hint = f"; did you mean --{near[0].replace('_', '-')}?" if near else ""
    return f"not known here: of another version of Megatron-LM, or of another program{hint}"


def _check(given: Given, taken: Taken, model: ModelConfig | None) -> None:
    """Refuse values that do not go together, with the names that they were given by."""
    sections: dict[str, JsonObject] = {name: {} for name in _SECTIONS}
    for key, value in taken.keys.items():
        section, _, own = key.partition(".")
        if section in sections and "." not in own:
            sections[section][own] = value
    try:
        parallel = ParallelConfig(**sections["parallel"])
        TrainerConfig(**sections["trainer"])
        OptimConfig(**sections["optim"])
        DataConfig(**{"path": "-", **sections["data"]})
        if model is not None:
            check_layout(model, parallel)
        warmup, steps = taken.keys.get("optim.lr_warmup_steps"), taken.keys.get("trainer.max_steps")
        if warmup and steps and warmup >= steps:
            raise ValueError(
                f"optim.lr_warmup_steps={warmup} must be below trainer.max_steps={steps}"
            )
    except (TypeError, ValueError) as error:
        message = str(error)
        for name in sorted(given.values, key=len, reverse=True):
            for key in tables.KEYS.get(name, ()):
                message = message.replace(key, given.name(name))
        raise ValueError(message) from error

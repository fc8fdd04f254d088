"""``logits/index.json`` of a result of ``teacher_logits``: what is stored, and what it serves.

    logits/index.json
    logits/train-00000.safetensors, ...        samples [0, shard_samples), ...
    logits/validation-00000.safetensors, ...

Sample i is the one that ``distill`` reads as number i from the same ``data`` keys, in order over
all ranks. Imports no torch, so that ``distill`` can refuse what does not fit at once.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nemo_minitron.config.base import TOKENS
from nemo_minitron.config.stages import DistillConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.documents import read_json_object

FOLDER = "logits"
INDEX = "index.json"
PARTS = ("train", "validation")
_MIXTURE = "mixture"
# Keys that decide which tokens a sample holds, the file itself apart -> their defaults.
DATA_KEYS = {f.name: f.default for f in fields(DataConfig) if TOKENS.items() <= f.metadata.items()}


@dataclass(frozen=True, kw_only=True)
class Part:
    """The samples of one split.

    Attributes:
        samples: how many.
        tokens: hash of the tokens of each shard (``logit_shards.shard_hash``).
    """

    samples: int
    tokens: list[str]


@dataclass(frozen=True, kw_only=True)
class LogitIndex:
    """Content of ``index.json``.

    Attributes:
        top_k: logits stored of each token.
        vocab_size: true vocabulary.
        seq_length: tokens of a sample.
        temperature: at which the normalisers were taken.
        dtype: ``float32`` or ``bfloat16``, of the values.
        shard_samples: samples of a shard; the last one of a part may hold fewer.
        data: ``data_keys`` of the stage; earlier versions stored fewer.
        parts: ``train``, and ``validation`` unless it was left out.
    """

    top_k: int
    vocab_size: int
    seq_length: int
    temperature: float
    dtype: str
    shard_samples: int
    data: dict[str, Any]
    parts: dict[str, Part]

    def save(self, folder: Path) -> None:
        """Write ``index.json`` into ``folder``."""
        (folder / INDEX).write_text(json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, folder: Path) -> "LogitIndex":
        """Read it from ``folder``, the ``logits/`` of a result that was checked."""
        values = read_json_object(folder / INDEX)
        try:
            values["parts"] = {name: Part(**part) for name, part in values["parts"].items()}
            return cls(**values)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder / INDEX} is not an index of stored logits: {error}"
            ) from error

    def changed_keys(self, data: DataConfig) -> str:
        """Return the ``data`` keys that differ from those of the stage, in words; maybe none."""
        before = {**DATA_KEYS, **self.data}  # an earlier version may have had fewer
        changes = [
            f"data.{key}={getattr(data, key)!r} ({before[key]!r} when they were stored)"
            for key in DATA_KEYS
            if getattr(data, key) != before[key]
        ]
        return ", ".join(changes)


def data_keys(data: DataConfig) -> dict[str, Any]:
    """``DATA_KEYS`` of a stage, and the mixture of its sources."""
    return {**{key: getattr(data, key) for key in DATA_KEYS}, _MIXTURE: _mixture(data)}


def _mixture(data: DataConfig) -> list[list[Any]]:
    """Return ``[first sample, shares of the sources]`` of each part of a blend."""
    if data.blend is None or len(data.blend) == 1:
        return []
    parts = [(0, [source["weight"] for source in data.blend])]
    for change in data.blend_changes or []:
        parts.append((change["step"] * data.global_batch_size, change["weights"]))
    # Weights of one ratio give one order; 12 digits are the same for all of them.
    return [[first, [round(w / sum(weights), 12) for w in weights]] for first, weights in parts]


def shard_name(part: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{part}-{number:05d}.safetensors"


def shard_range(number: int, shard_samples: int, samples: int) -> range:
    """Return the samples of shard ``number`` of a part."""
    start = number * shard_samples
    return range(start, min(start + shard_samples, samples))


def shard_numbers(shard_samples: int, samples: int) -> range:
    """Return the numbers of all shards of a part."""
    return range(-(-samples // shard_samples))


def check_stored(cfg: DistillConfig, vocab_size: int) -> LogitIndex:
    """Refuse stored outputs that this distillation cannot use; the tokens are compared later.

    Args:
        cfg: with ``teacher_logits``.
        vocab_size: true vocabulary of the student.

    Raises:
        ValueError: names the value, the relation and the key to set.
    """
    index = LogitIndex.load(Path(str(cfg.teacher_logits)) / FOLDER)
    for problem in _problems(cfg, index, vocab_size):
        raise ValueError(f"teacher_logits={cfg.teacher_logits} {problem}")
    return index


def _problems(cfg: DistillConfig, index: LogitIndex, vocab_size: int) -> Iterator[str]:
    losses = cfg.distillation
    if index.vocab_size != vocab_size:
        yield (
            f"holds logits over a vocabulary of {index.vocab_size} but student has vocab_size="
            f"{vocab_size}; set student= and teacher_logits= to models of one tokenizer; if they "
            "are, and one is padded to more rows, import that one again with vocab_size="
            f"{min(index.vocab_size, vocab_size)}"
        )
    if losses.top_k is not None and losses.top_k > index.top_k:
        yield (
            f"holds {index.top_k} logits of each token, fewer than distillation.top_k="
            f"{losses.top_k}; lower it, or run teacher_logits again with top_k={losses.top_k}"
        )
    if losses.loss == "top_k_tail" and losses.temperature != index.temperature:
        yield (
            f"holds normalisers at temperature={index.temperature}, and top_k_tail needs those at "
            f"distillation.temperature={losses.temperature}; set distillation.temperature="
            f"{index.temperature} or distillation.loss=top_k, or run teacher_logits again"
        )
    if changes := index.changed_keys(cfg.data):
        yield f"was made from other samples: {changes}; set these keys as they were"
    yield from _remixed(cfg, index)
    yield from _lacking(cfg, index)


def _remixed(cfg: DistillConfig, index: LogitIndex) -> Iterator[str]:
    now = _mixture(cfg.data)
    last = cfg.trainer.max_steps * cfg.data.global_batch_size
    # Changes behind the last sample that is read decide nothing.
    then = [part for part in index.data.get(_MIXTURE, now) if part[0] < last]
    if then != now:
        yield (
            "was made from another mixture of sources: data.blend and data.blend_changes say "
            f"{now or 'one source'} (first sample, shares), and said {then or 'one source'} when "
            "they were stored; set these keys and data.global_batch_size as they were"
        )


def _lacking(cfg: DistillConfig, index: LogitIndex) -> Iterator[str]:
    wanted, held = cfg.trainer.max_steps * cfg.data.global_batch_size, index.parts["train"].samples
    if wanted > held:
        yield (
            f"holds {held} training samples, fewer than trainer.max_steps={cfg.trainer.max_steps} "
            f"x data.global_batch_size={cfg.data.global_batch_size}; lower trainer.max_steps, or "
            "run teacher_logits again with these keys"
        )
    samples = Path(cfg.data.path)  # token ids as they are have no validation split
    validates = not (samples.suffix == ".npy" and samples.is_file())
    if cfg.trainer.limit_val_batches and validates and "validation" not in index.parts:
        yield (
            "holds no validation samples; set trainer.limit_val_batches=0, or run teacher_logits "
            f"again with trainer.limit_val_batches={cfg.trainer.limit_val_batches}"
        )

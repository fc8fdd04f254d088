"""Data and trainer settings shared by the stages that run a model."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from nemo_minitron.config.base import (
    ADDED,
    INPUT,
    MAY_CHANGE,
    NEUTRAL,
    TOKENS,
    check_values,
    one_of,
)
from nemo_minitron.config.blend import is_blend, parse_blend, parse_changes
from nemo_minitron.config.optim import OptimConfig as OptimConfig

RECOMPUTE_KEYS = (
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)
"""Megatron's settings of activation recomputation that ``trainer`` has too."""
PRECISION = one_of("32", "bf16-mixed")
CALIBRATION_SAMPLES = 1024
"""What the stages that score ask for where nobody says; they take fewer where there are no more."""


def check_seed(seed: int) -> None:
    """Refuse a ``data.seed`` that NumPy, which shuffles for Megatron, does not take."""
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"data.seed={seed} must be from 0 to {(1 << 32) - 1}")


@dataclass(kw_only=True)
class DataConfig:
    """Where tokens come from and how they are cut into samples."""

    path: str = field(default=MISSING, metadata=INPUT)
    """Text, JSON(L), Parquet or Arrow file, folder of such files or pattern that names them, folder
    of ``datasets``, Megatron .bin/.idx prefix, .npy of token ids, or YAML file as for ``blend``."""
    blend: Any = field(default=None, metadata=INPUT)
    """Weighted sources in place of ``path``: a list of ``{weight, path}``, weights and paths in
    turn, or a YAML file that holds such a list; samples come in Megatron's blended order."""
    blend_changes: list[dict[str, Any]] | None = field(default=None, metadata=ADDED)
    """Other weights of the sources of ``blend`` from steps on, a list of ``{step, weights}``; a run
    that goes on may have new ones, of steps that are not trained yet."""
    blend_max_epochs: float | None = field(default=None, metadata=ADDED)
    """Most times that training may read each source of ``blend``; null: as often as needed."""
    seq_length: int = field(default=512, metadata=TOKENS)
    """Tokens of each sample."""
    num_samples: int | None = None
    """Samples to use (calibration, evaluation); null means all of them once."""
    split: str = field(default="90,5,5", metadata=TOKENS)
    """Shares of documents for train, validation and test."""
    split_name: str = field(default="train", metadata=one_of("train", "validation", "test"))
    """The split that a stage which does not train reads."""
    micro_batch_size: int = field(default=1, metadata=MAY_CHANGE)
    """Samples per forward pass and rank."""
    global_batch_size: int = 8
    """Samples per optimizer step over all ranks."""
    seed: int = field(default=1234, metadata=TOKENS)
    """Seed of the document order (before the split) and of Megatron's sample shuffle."""
    text_key: str = field(default="text", metadata=TOKENS)
    """Key of the text in a JSONL record."""
    records: str = field(
        default="auto", metadata={**ADDED, **TOKENS, **one_of("auto", "text", "sft")}
    )
    """What records are: ``text`` under text_key, or ``sft`` (``messages``, or ``prompt`` and
    ``completion``; the loss counts answers alone); ``auto`` looks at the first one."""
    pack: bool = field(default=True, metadata={**ADDED, **TOKENS})
    """Whether SFT records share samples, each with attention and positions of its own."""
    record_too_long: str = field(
        default="refuse", metadata={**ADDED, **TOKENS, **one_of("refuse", "keep", "cut", "drop")}
    )
    """SFT records longer than a sample: ``refuse``, ``keep`` the end (and leave out the beginning
    of the prompt), ``cut`` the end, or ``drop`` them."""
    document_separator: str = field(default="\n\n", metadata=TOKENS)
    """What separates documents inside one plain text file."""
    cache_dir: str | None = field(default=None, metadata=NEUTRAL)
    """Folder of tokenised data; null means ``<output_dir>/../.data-cache``."""

    def __post_init__(self) -> None:
        """Check values that do not depend on the data."""
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}={getattr(self, name)} must be at least 1")
        if self.num_samples is not None and self.num_samples < 1:
            raise ValueError(f"data.num_samples={self.num_samples} must be at least 1, or null")
        check_values(self, "data.")
        check_seed(self.seed)
        self._check_blend()

    def _check_blend(self) -> None:
        if self.blend is None and is_blend(self.path):
            self.path, self.blend = "", self.path
        if self.blend is not None:
            self.blend = parse_blend(self.blend)
        if self.blend is not None and self.path not in ("", None, MISSING):
            raise ValueError(
                f"data.path={self.path} and data.blend are both set; leave one of them out"
            )
        if self.blend is None and self.path == "":
            raise ValueError("data.path is empty; set data.path, or data.blend")
        for name in ("blend_changes", "blend_max_epochs"):
            if self.blend is None and getattr(self, name) is not None:
                raise ValueError(
                    f"data.{name}={getattr(self, name)} is for data.blend, which is not set; leave "
                    "it out"
                )
        if self.blend_max_epochs is not None and self.blend_max_epochs <= 0:
            raise ValueError(f"data.blend_max_epochs={self.blend_max_epochs} must be above 0")
        if self.blend is not None and self.blend_changes is not None:
            self.blend_changes = parse_changes(self.blend_changes, len(self.blend))

    @property
    def given(self) -> bool:
        """Whether there is anything to read."""
        return bool(self.path or self.blend)

    def sources(self) -> list["DataConfig"]:
        """Return the keys of each source of ``blend`` on its own, all of its samples."""
        alone: dict[str, Any] = dict.fromkeys(
            ("blend", "blend_changes", "blend_max_epochs", "num_samples")
        )
        return [replace(self, path=one["path"], **alone) for one in self.blend]

    def weights(self) -> list[float]:
        """Return the weights of the sources of ``blend``, as given."""
        return [source["weight"] for source in self.blend]

    def weights_by_samples(self, samples: int) -> list[tuple[list[float], int]]:
        """Weights of the sources of ``blend``, and how many samples in turn are drawn by them.

        Args:
            samples: of the whole training.
        """
        changes = self.blend_changes or []
        starts = [0, *(change["step"] * self.global_batch_size for change in changes), samples]
        weights = [self.weights(), *(change["weights"] for change in changes)]
        sizes = [end - begin for begin, end in pairwise(starts)]
        return list(zip(weights, sizes, strict=True))

    def names(self) -> list[str]:
        """Short names of the sources of ``blend``, no two the same."""
        return [f"{i}_{Path(source['path']).stem}" for i, source in enumerate(self.blend)]


@dataclass(kw_only=True)
class OptionalDataConfig(DataConfig):
    """Data of a stage that can do without any."""

    path: str | None = field(default=None, metadata=INPUT)  # type: ignore[assignment]  # here it may be missing
    """As in the stages that need it; null when there is no text to read (``prune`` that scores
    nothing, ``evaluate`` of tasks alone)."""


MOST_LEFT_OUT = 10
"""Steps in a row that ``trainer.skip_loss_above`` leaves out: with more it is not the data."""
_NOT_NEGATIVE = (
    "limit_val_batches",
    "save_every_n_steps",
    "save_every_n_minutes",
    "keep_every_n_steps",
    "exit_interval",
    "exit_duration_in_mins",
    "hang_after_minutes",
    "gradient_clip_val",
    "rewind_steps",
    "max_rewinds",
)


@dataclass(kw_only=True)
class TrainerConfig:
    """How long a training runs, and how often it validates, logs and saves; Lightning's names."""

    max_steps: int = 100
    """Optimizer steps of the whole training."""
    phases: list[dict[str, Any]] | None = field(default=None, metadata=INPUT)
    """Parts of the training with other data: a list of ``{steps, data}``, where ``data`` holds what
    differs from ``data.*`` (seq_length, path or blend, batch sizes, ...); null: one part."""
    val_check_interval: int = 50
    """Optimizer steps between two validations."""
    limit_val_batches: int = 8
    """Global batches per validation; 0 switches validation off."""
    log_every_n_steps: int = field(default=1, metadata=MAY_CHANGE)
    """Optimizer steps between two log lines."""
    save_every_n_steps: int = field(default=50, metadata=MAY_CHANGE)
    """Steps between resumable checkpoints; 0 keeps only the final one."""
    save_top_k: int = field(default=2, metadata=MAY_CHANGE)
    """Resumable checkpoints kept (the newest ones)."""
    save_every_n_minutes: float = field(default=0.0, metadata=NEUTRAL)
    """Minutes between further resumable checkpoints; 0 writes none by the clock."""
    keep_every_n_steps: int = field(default=0, metadata=NEUTRAL)
    """Besides the newest, keep the checkpoints of steps that this divides; 0 keeps none of them."""
    async_save: bool = field(default=False, metadata=NEUTRAL)
    """Whether training goes on while a checkpoint is written, by a process beside each rank."""
    exit_interval: int = field(default=0, metadata=NEUTRAL)
    """Save and exit with 75 at steps that this divides, as when a signal asks for it; 0 never."""
    exit_duration_in_mins: float = field(default=0.0, metadata=NEUTRAL)
    """Save and exit with 75 once training has run for so many minutes; 0 never."""
    hang_after_minutes: float = field(default=0.0, metadata=NEUTRAL)
    """Once a rank has ended no step and no batch of a validation, and begun no checkpoint, for so
    long, it leaves the stacks of its threads in ``logs/hung`` and exits with 75; 0 waits for ever.
    """
    log_memory: bool = field(default=False, metadata=NEUTRAL)
    """Whether to log the most memory of a rank (on a GPU that of its tensors)."""
    straggler_ratio: float = field(default=0.0, metadata=NEUTRAL)
    """Name the slowest rank and its node where its own part of a step takes above so many times the
    median of all ranks, at each log line; 0 does not measure it."""
    gradient_clip_val: float = 1.0
    """Global gradient norm limit; 0 switches clipping off."""
    skip_loss_above: float = field(default=0.0, metadata=ADDED)
    """A step whose loss (on labels and logits) is above so many times the mean of those before, or
    that gives no number, changes nothing, and is logged; 0: all count, and NaN ends the training.
    """
    rewind_steps: int = field(default=0, metadata=ADDED)
    """After more than ten steps in a row that skip_loss_above left out, weights and optimizer go
    back to the newest checkpoint so many steps before them or more, and the batches since then are
    left out too; 0 ends the training instead."""
    max_rewinds: int = field(default=3, metadata=NEUTRAL)
    """Times that rewind_steps may do so in a training; after that it ends."""
    precision: str = field(default="32", metadata=PRECISION)
    """``32`` or ``bf16-mixed`` (bf16 weights, fp32 main weights and gradients)."""
    seed: int = 1234
    """Seed of everything that draws numbers during training."""
    num_nodes: int | None = field(default=None, metadata=NEUTRAL)
    """Nodes that ``minitron submit`` asks for; a run on another number is refused. null: those that
    the launcher used."""
    recompute_granularity: str | None = field(
        default=None, metadata={**MAY_CHANGE, **one_of("full", "selective", None)}
    )
    """Activations of the trained model that the backward pass computes again to save memory:
    ``full`` (whole layers), ``selective`` (parts of each layer) or null (none), as in Megatron."""
    recompute_method: str | None = field(
        default=None, metadata={**MAY_CHANGE, **one_of("uniform", "block", None)}
    )
    """Layers to recompute under ``full``: ``uniform`` (all, in groups of recompute_num_layers) or
    ``block`` (the first recompute_num_layers of each model chunk, one by one). A pipeline stage is
    one chunk, or virtual_pipeline_model_parallel_size of them."""
    recompute_num_layers: int | None = field(default=None, metadata=MAY_CHANGE)
    """Layers of a group or chunk, see recompute_method; Megatron takes it with ``full`` alone."""
    recompute_modules: list[str] | None = field(default=None, metadata=MAY_CHANGE)
    """Parts to recompute under ``selective``, any of ``core_attn``, ``mlp`` and ``moe``; null means
    ``core_attn``."""

    def __post_init__(self) -> None:
        """Check ranges and relations."""
        if self.max_steps < 1:
            raise ValueError(f"trainer.max_steps={self.max_steps} must be at least 1")
        check_values(self, "trainer.")
        if self.num_nodes is not None and self.num_nodes < 1:
            raise ValueError(f"trainer.num_nodes={self.num_nodes} must be at least 1, or null")
        for name, least in (("val_check_interval", 1), ("log_every_n_steps", 1), ("save_top_k", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must be at least {least}")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name}={getattr(self, name)} must not be negative")
        for name in ("skip_loss_above", "straggler_ratio"):
            if getattr(self, name) and getattr(self, name) <= 1:
                raise ValueError(f"trainer.{name}={getattr(self, name):g} must be above 1, or 0")
        self._check_rewinds()
        self._check_recompute()

    def _check_rewinds(self) -> None:
        """Check that the checkpoint that ``rewind_steps`` goes back to is written and kept."""
        key = f"trainer.rewind_steps={self.rewind_steps}"
        if not self.rewind_steps:
            return
        if not self.skip_loss_above:
            raise ValueError(
                f"{key} goes back when leaving out steps did not help, and "
                "trainer.skip_loss_above=0 leaves out none; set that to 3, say"
            )
        if not self.save_every_n_steps:
            raise ValueError(
                f"{key} goes back to a checkpoint, and trainer.save_every_n_steps=0 writes none; "
                "set the number of steps between them"
            )
        held, back = (
            (self.save_top_k - 1) * self.save_every_n_steps,
            self.rewind_steps + MOST_LEFT_OUT,
        )
        if held < back:
            raise ValueError(
                f"{key} and the {MOST_LEFT_OUT} bad steps before it go back {back} steps, which "
                f"must be at most (trainer.save_top_k - 1) * trainer.save_every_n_steps={held}: "
                "older checkpoints are deleted; raise trainer.save_top_k"
            )

    def _check_recompute(self) -> None:
        """Check Megatron's rules of recomputation, and name the keys to set."""
        key, value = "trainer.recompute_granularity", self.recompute_granularity
        missing = self.recompute_method is None or (self.recompute_num_layers or 0) < 1
        if value == "full" and missing:
            raise ValueError(
                f"{key}=full needs trainer.recompute_method (uniform or block; here "
                f"{self.recompute_method}) and trainer.recompute_num_layers of at least 1 "
                f"(here {self.recompute_num_layers}); uniform and 1 recompute every layer"
            )
        for name in ("recompute_method", "recompute_num_layers"):
            if value != "full" and getattr(self, name) is not None:
                raise ValueError(
                    f"trainer.{name}={getattr(self, name)} needs {key}=full (here {value}); set "
                    "one of the two to null"
                )
        if self.recompute_modules is not None:
            self._check_recompute_modules(self.recompute_modules)

    def _check_recompute_modules(self, modules: list[str]) -> None:
        if self.recompute_granularity != "selective":
            raise ValueError(
                f"trainer.recompute_modules={modules} needs trainer.recompute_granularity="
                f"selective (here {self.recompute_granularity})"
            )
        # Megatron's others (moe_act, layernorm, mla_up_proj) belong to modules that these models
        # do not have, or that Transformer Engine fuses.
        allowed = ("core_attn", "mlp", "moe")
        unknown = [name for name in modules if name not in allowed]
        if unknown or not modules:
            raise ValueError(
                f"trainer.recompute_modules={modules} must name some of {', '.join(allowed)}"
                + (f", not {', '.join(unknown)}" if unknown else "")
            )

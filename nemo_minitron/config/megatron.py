"""The section ``megatron:`` any field of Megatron's own dataclasses, for whoever needs it.

Names and types are those of the installed Megatron-Core, which is imported only where the section
holds something. Fields that this package decides are refused with what decides them
(``config/megatron_owned.py``).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from nemo_minitron.config import megatron_owned as owned
from nemo_minitron.config.base import ADDED, may_change
from nemo_minitron.config.training import RECOMPUTE_KEYS, OptimConfig, TrainerConfig

PARTS: Mapping[str, owned.Owned] = {
    "transformer": owned.TRANSFORMER,
    "ddp": owned.DDP,
    "optimizer": owned.OPTIMIZER,
}
"""Part of the section -> fields of its dataclass that are set elsewhere."""

GROUP = "microbatch_group_size_per_vp_stage"
"""Field of ``TransformerConfig``: micro-batches that a virtual stage runs in a row."""
# When gradients travel, not what they are.
_BUCKETS = may_change("overlap_", "align_param_gather", "bucket_size", "num_buckets")


@dataclass(kw_only=True)
class ForwardMegatronConfig:
    """Settings of a model that is run, not trained."""

    transformer: dict[str, Any] = field(
        default_factory=dict, metadata={**ADDED, **may_change("recompute_")}
    )
    """Fields of Megatron's ``TransformerConfig``, with its names and values. Those that the layout,
    the model or another key sets are refused with what sets them. A frozen teacher gets them too,
    those about the backward pass apart (recomputation, offloading of activations)."""

    def __post_init__(self) -> None:
        """Check names, types and owners; Megatron's own relations follow when it is built."""
        for part in fields(self):
            check_part(part.name, getattr(self, part.name))
        self._check_trains()

    def _check_trains(self) -> None:
        for name in sorted(owned.TRAINING_ONLY & set(self.transformer)):
            raise ValueError(
                f"megatron.transformer.{name}={self.transformer[name]} is for the backward pass, "
                "which this stage does not have; leave it out"
            )


@dataclass(kw_only=True)
class MegatronConfig(ForwardMegatronConfig):
    """Settings of a model that is trained."""

    ddp: dict[str, Any] = field(default_factory=dict, metadata={**ADDED, **_BUCKETS})
    """Fields of Megatron's ``DistributedDataParallelConfig``: the gradient buffers. On GPUs
    ``overlap_grad_reduce`` and ``overlap_param_gather`` are on where they can be."""
    optimizer: dict[str, Any] = field(default_factory=dict, metadata=ADDED)
    """Fields of Megatron's ``OptimizerConfig``."""

    def __post_init__(self) -> None:
        """Check also how the parts depend on each other."""
        super().__post_init__()
        gather = self.ddp.get("overlap_param_gather")
        if gather and self.ddp.get("overlap_grad_reduce") is False:
            raise ValueError(
                "megatron.ddp.overlap_param_gather=true needs megatron.ddp.overlap_grad_reduce="
                "true; set it, or leave both out"
            )
        if self.ddp.get("align_param_gather") and not gather:
            raise ValueError(
                "megatron.ddp.align_param_gather=true needs megatron.ddp.overlap_param_gather="
                "true; set it, or leave both out"
            )

    def _check_trains(self) -> None:
        """Refuse nothing here: with a backward pass every setting has an effect."""


def check_part(part: str, values: Mapping[str, Any]) -> None:
    """Refuse fields that are unknown, owned or of another type.

    Args:
        part: ``transformer``, ``ddp`` or ``optimizer``.
        values: field -> plain value, as in the config.

    Raises:
        ValueError: names the field, and the nearest one or what sets it.
    """
    if not isinstance(values, Mapping):
        raise ValueError(
            f"megatron.{part}={values} must be a mapping of fields to values; set "
            f"megatron.{part}.<field>=<value>"
        )
    for name, value in values.items():
        if name in PARTS[part]:
            raise ValueError(
                f"megatron.{part}.{name}={value} cannot be set here: {name} is set by "
                f"{PARTS[part][name]}"
            )
    if values:
        from nemo_minitron.runtime.megatron_fields import resolved

        resolved(part, values)


def check_optimizer(megatron: MegatronConfig, optim: OptimConfig) -> None:
    """Refuse settings that want the distributed optimizer where it is off.

    Raises:
        ValueError: names both keys.
    """
    if optim.use_distributed_optimizer:
        return
    wanting = {
        "ddp.overlap_param_gather": megatron.ddp.get("overlap_param_gather"),
        "ddp.reduce_scatter_with_fp32_accumulation": megatron.ddp.get(
            "reduce_scatter_with_fp32_accumulation"
        ),
        "optimizer.use_precision_aware_optimizer": megatron.optimizer.get(
            "use_precision_aware_optimizer"
        ),
    }
    for key, value in wanting.items():
        if value:
            raise ValueError(
                f"megatron.{key}=true needs optim.use_distributed_optimizer=true (here false); "
                "change one of them"
            )


def merged_recompute(trainer: TrainerConfig, megatron: MegatronConfig) -> TrainerConfig:
    """Return the trainer with activation recomputation from both places that may set it.

    ``megatron.transformer.recompute_granularity=full`` alone recomputes every layer: Megatron
    wants a method and a number too, which are ``uniform`` and 1 then.

    Raises:
        ValueError: the places disagree, or the settings do not go together.
    """
    given = {
        key: megatron.transformer[key] for key in RECOMPUTE_KEYS if key in megatron.transformer
    }
    if not given:
        return trainer
    for key, value in given.items():
        other = getattr(trainer, key)
        if other is not None and other != value:
            raise ValueError(
                f"trainer.{key}={other} and megatron.transformer.{key}={value} disagree; leave one "
                "of them out"
            )
    merged = {key: given.get(key, getattr(trainer, key)) for key in RECOMPUTE_KEYS}
    if merged["recompute_granularity"] == "full":
        merged["recompute_method"] = merged["recompute_method"] or "uniform"
        merged["recompute_num_layers"] = merged["recompute_num_layers"] or 1
    try:
        return replace(trainer, **merged)
    except ValueError as error:
        raise ValueError(named_as_given(str(error), megatron)) from error


def named_as_given(message: str, megatron: MegatronConfig) -> str:
    """A message about ``trainer.recompute_*`` with the section's keys where that is what is set."""
    if any(key in megatron.transformer for key in RECOMPUTE_KEYS):
        return message.replace("trainer.recompute_", "megatron.transformer.recompute_")
    return message


def given_keys(megatron: ForwardMegatronConfig) -> Iterator[tuple[str, Any]]:
    """``megatron.<part>.<field>`` and value of everything that is set."""
    for part, values in asdict(megatron).items():
        for name, value in values.items():
            yield f"megatron.{part}.{name}", value

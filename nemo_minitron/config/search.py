"""``minitron search``: the shapes, the budget, and how candidates are compared."""

from dataclasses import dataclass, field, fields
from typing import Any

from omegaconf import MISSING

from nemo_minitron.config.base import ADDED, INPUT, MAY_CHANGE, NEUTRAL, StageConfig, check_values
from nemo_minitron.config.inference import LmEvalConfig
from nemo_minitron.config.megatron import ForwardMegatronConfig, MegatronConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import PRECISION, DataConfig, TrainerConfig

SEARCHED_LATER = (
    "num_moe_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "mamba_num_heads",
    "mamba_head_dim",
)
"""Sizes that are part of a candidate, and of its folder's name, only where they are searched."""
SEARCHED = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    *SEARCHED_LATER,
)

_TOLERANCE = 0.05


@dataclass(kw_only=True)
class ShortDistillConfig:
    """A short distillation of the best candidates, which orders them better than pruning alone."""

    steps: int = 0
    """Optimizer steps (2407.14679: 400 of 1152 x 4096 tokens, ranks settle after 300); 0: none, and
    candidates are compared right after pruning."""
    top: int = 3
    """Candidates that are distilled, best loss right after pruning first."""
    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine decay."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up."""
    precision: str = field(default=TrainerConfig.precision, metadata=PRECISION)
    """Precision of the short distillation."""
    save_every_n_steps: int = field(default=50, metadata=NEUTRAL)
    """Steps between checkpoints, from which a killed search goes on; 0 saves none."""

    def __post_init__(self) -> None:
        """Check ranges; ``optim`` and ``trainer`` refuse the rest."""
        check_values(self, "search.distill.")
        if self.steps < 0:
            raise ValueError(f"search.distill.steps={self.steps} must not be negative")
        if self.top < 1:
            raise ValueError(f"search.distill.top={self.top} must be at least 1")
        given = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
        if given and not self.steps:
            raise ValueError(
                f"search.distill.{given[0]}={getattr(self, given[0])} has no effect with "
                "search.distill.steps=0; set the steps, or leave it out"
            )


@dataclass(kw_only=True)
class SearchSpaceConfig:
    """Sizes to combine, and what a combination may cost."""

    num_layers: list[Any] = field(default_factory=list)
    """Sizes to try: numbers and inclusive ranges ``start:stop:step``; empty keeps the model's."""
    hidden_size: list[Any] = field(default_factory=list)
    """Sizes to try, written as those of num_layers."""
    ffn_hidden_size: list[Any] = field(default_factory=list)
    """Sizes to try, written as those of num_layers."""
    num_attention_heads: list[Any] = field(default_factory=list)
    """Sizes to try, written as those of num_layers."""
    num_query_groups: list[Any] = field(default_factory=list)
    """Sizes to try, written as those of num_layers."""
    num_moe_experts: list[Any] = field(default_factory=list, metadata=ADDED)
    """Sizes to try, written as those of num_layers."""
    moe_ffn_hidden_size: list[Any] = field(default_factory=list, metadata=ADDED)
    """Sizes to try, written as those of num_layers."""
    moe_shared_expert_intermediate_size: list[Any] = field(default_factory=list, metadata=ADDED)
    """Sizes to try, written as those of num_layers."""
    mamba_num_heads: list[Any] = field(default_factory=list, metadata=ADDED)
    """Sizes to try, written as those of num_layers."""
    mamba_head_dim: list[Any] = field(default_factory=list, metadata=ADDED)
    """Sizes to try, written as those of num_layers."""
    divisor: int = 1
    """What hidden_size and ffn_hidden_size must be multiples of (64 suits tensor cores)."""
    tensor_model_parallel_size: int = 1
    """Tensor-parallel degree that every candidate must split into."""
    target_params: float | None = None
    """Parameters that a candidate shall have; it may differ by ``tolerance``."""
    tolerance: float = _TOLERANCE
    """Share of target_params by which a candidate may differ from it (2407.14679: 5 %)."""
    max_params: float | None = None
    """Most parameters that a candidate may have."""
    max_active_params: float | None = field(default=None, metadata=ADDED)
    """Most parameters that a token meets: of the routed experts those that it is routed to."""
    max_memory_gb: float | None = None
    """Most memory at inference, GiB: weights, and of batch_size sequences keys, values and the
    states of Mamba layers."""
    batch_size: int = 1
    """Sequences whose keys, values and states max_memory_gb counts."""
    seq_length: int = 4096
    """Tokens of each of these sequences."""
    max_latency_ms: float | None = field(default=None, metadata=MAY_CHANGE)
    """Longest forward pass of a sample of ``data``, measured while candidates are scored."""
    max_candidates: int = 20
    """Most candidates that are pruned and scored (2407.14679: less than 20)."""
    distill: ShortDistillConfig = field(default_factory=ShortDistillConfig)

    def __post_init__(self) -> None:
        """Check ranges and read the ranges of sizes."""
        check_values(self, "search.")
        for name in SEARCHED:
            setattr(self, name, _sizes(name, getattr(self, name)))
        for name in ("divisor", "tensor_model_parallel_size", "batch_size", "seq_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"search.{name}={getattr(self, name)} must be at least 1")
        if self.max_candidates < 1:
            raise ValueError(f"search.max_candidates={self.max_candidates} must be at least 1")
        if not 0 < self.tolerance < 1:
            raise ValueError(f"search.tolerance={self.tolerance} must lie between 0 and 1")
        if self.tolerance != _TOLERANCE and self.target_params is None:
            raise ValueError(
                f"search.tolerance={self.tolerance} is for search.target_params, which is not set"
            )
        budgets = ("target_params", "max_params", "max_active_params", "max_memory_gb")
        for name in (*budgets, "max_latency_ms"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"search.{name}={value} must be above 0")


def _sizes(name: str, values: list[Any]) -> list[int]:
    """Return numbers of a list of numbers and ranges, ascending."""
    found: set[int] = set()
    for value in values:
        parts = str(value).split(":")
        if not all(part.isdigit() for part in parts) or len(parts) not in (1, 3) or "0" in parts:
            raise ValueError(
                f"search.{name} holds {value}; give sizes and ranges 'start:stop:step', all above 0"
            )
        numbers = [int(part) for part in parts]
        if parts[1:] and numbers[0] > numbers[1]:
            raise ValueError(
                f"search.{name} holds {value}, whose start is above its stop; give the smaller "
                "size first"
            )
        found |= {*range(numbers[0], numbers[1] + 1, numbers[2])} if parts[1:] else {numbers[0]}
    return sorted(found)


@dataclass(kw_only=True)
class SearchConfig(StageConfig):
    """Shapes within a budget, compared by loss or tasks after pruning or a short distillation."""

    checkpoint: str = field(default=MISSING, metadata=INPUT)
    """Result folder that holds the model to prune."""
    importance: str | None = field(default=None, metadata=INPUT)
    """Result folder of ``importance`` for this model."""
    layer_criterion: str = "block_influence"
    """Which scores choose the layers that stay; see ``pruning.layer_criterion``."""
    search: SearchSpaceConfig = field(default_factory=SearchSpaceConfig)
    data: DataConfig = field(
        default_factory=lambda: DataConfig(split_name="validation", num_samples=64)
    )
    tasks: list[str] = field(default_factory=list, metadata=ADDED)
    """Tasks or groups of lm-eval whose score orders candidates. Empty: the LM loss on ``data``
    does, which is measured in any case."""
    task_metric: str = field(default="acc", metadata=ADDED)
    """What counts of each task, higher being better, as ``evaluate`` names it; candidates are
    ordered by its mean over ``tasks``."""
    tasks_path: str | None = field(default=None, metadata={**INPUT, **ADDED})
    """Folder of task files (YAML) beside those that lm-eval brings."""
    lm_eval: LmEvalConfig = field(default_factory=LmEvalConfig, metadata=ADDED)
    parallel: ParallelConfig = field(default_factory=ParallelConfig, metadata=MAY_CHANGE)
    megatron: MegatronConfig = field(default_factory=MegatronConfig)
    """Candidates are scored with ``transformer``, less what is about the backward pass, and
    distilled with all of it."""

    def __post_init__(self) -> None:
        """Refuse settings of the short training when no candidate is trained."""
        super().__post_init__()
        given = {"task_metric": "acc", "tasks_path": None, "lm_eval": LmEvalConfig()}
        for name, default in given.items():
            if not self.tasks and getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)} is for tasks, but tasks is empty; add "
                    "tasks=[...]"
                )
        if not self.search.distill.steps:
            # As a stage that trains nothing would.
            ForwardMegatronConfig(transformer=self.megatron.transformer)
            for part in ("ddp", "optimizer"):
                if getattr(self.megatron, part):
                    raise ValueError(
                        f"megatron.{part}={getattr(self.megatron, part)} has no effect with "
                        "search.distill.steps=0; set the steps, or leave it out"
                    )

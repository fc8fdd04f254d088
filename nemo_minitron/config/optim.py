"""The optimizer of the stages that train a model: section ``optim``."""

from dataclasses import dataclass, field

from nemo_minitron.config.base import check_values, one_of


@dataclass(kw_only=True)
class OptimConfig:
    """Adam and the schedule of its learning rate, by Megatron's names."""

    lr: float = 1e-4
    """Peak learning rate."""
    min_lr: float = 1e-5
    """Learning rate at the end of the decay."""
    lr_warmup_steps: int = 0
    """Steps of linear warm-up from 0 to lr."""
    lr_decay_style: str = field(default="cosine", metadata=one_of("cosine", "linear", "constant"))
    """How the learning rate falls after the warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay; norms and biases are excluded (Megatron's rule)."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    use_distributed_optimizer: bool = True
    """Shard optimizer state over the data-parallel ranks."""

    def __post_init__(self) -> None:
        """Check ranges and relations."""
        check_values(self, "optim.")
        for name in ("lr", "lr_warmup_steps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"optim.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr} must lie between 0 and optim.lr={self.lr}; "
                "lower optim.min_lr, or raise optim.lr"
            )
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"optim.{name}={getattr(self, name)} must be from 0 to below 1")
        if self.adam_eps <= 0:
            raise ValueError(f"optim.adam_eps={self.adam_eps} must be above 0")

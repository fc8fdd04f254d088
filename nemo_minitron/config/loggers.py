"""Where a training run sends its logs."""

import importlib.util
from dataclasses import dataclass, field
from typing import Any

from nemo_minitron.runtime.plugins import added


@dataclass(kw_only=True)
class WandbConfig:
    """Arguments of Lightning's ``WandbLogger``."""

    project: str | None = None
    """Project of the run; must be given."""
    name: str | None = None
    """Name of the run; must be given."""
    entity: str | None = None
    """User or team that owns the run; null means the one that is logged in."""
    group: str | None = None
    """Group of runs that Weights & Biases shows together."""
    offline: bool = False
    """Write to ``logs/wandb`` only, for ``wandb sync`` later: on nodes without a network."""


_PACKAGES = {"mlflow": "mlflow", "comet": "comet_ml"}


@dataclass(kw_only=True)
class ExpManagerConfig:
    """Loggers of a training run; the names are those of NeMo's ``exp_manager``."""

    create_tensorboard_logger: bool = True
    """Write TensorBoard events into ``logs/`` of the result."""
    create_wandb_logger: bool = False
    """Log to Weights & Biases too (``pip install wandb``)."""
    wandb_logger_kwargs: WandbConfig = field(default_factory=WandbConfig)
    loggers: dict[str, Any] = field(default_factory=dict)
    """Others, name -> arguments: ``mlflow`` and ``comet`` (Lightning's), or what a package adds."""

    def __post_init__(self) -> None:
        """Check that the loggers can be had."""
        self._check_others()
        if not self.create_wandb_logger:
            return
        for name in ("project", "name"):
            if not getattr(self.wandb_logger_kwargs, name):
                raise ValueError(
                    f"exp_manager.create_wandb_logger=true needs exp_manager.wandb_logger_kwargs."
                    f"{name}; set it"
                )
        if importlib.util.find_spec("wandb") is None:
            raise ValueError(
                "exp_manager.create_wandb_logger=true needs the package wandb, which is not "
                "installed: pip install wandb, or set it to false"
            )

    def _check_others(self) -> None:
        known = (*_PACKAGES, *added("loggers", tuple(_PACKAGES)))
        for name, arguments in self.loggers.items():
            if name not in known:
                raise ValueError(f"exp_manager.loggers.{name} must be one of {', '.join(known)}")
            if not isinstance(arguments, dict):
                raise ValueError(
                    f"exp_manager.loggers.{name}={arguments} must be a mapping of arguments, {{}} "
                    "for none"
                )
            package = _PACKAGES.get(name)
            if package and importlib.util.find_spec(package) is None:
                raise ValueError(
                    f"exp_manager.loggers.{name} needs the package {package}, which is not "
                    f"installed: pip install {package}, or leave the logger out"
                )

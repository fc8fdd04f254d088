"""What one call of ``logit_loss`` computes."""

from dataclasses import dataclass

from nemo_minitron.config.distillation import DistillationConfig


@dataclass(frozen=True)
class LogitLossConfig:
    """``kd_weight * KD(teacher, student) + ce_weight * CE(labels)``.

    The fields are those of ``config.distillation.DistillationConfig``, and one more.
    """

    loss: str = "forward_kl"
    temperature: float = 1.0
    temperature_scaling: str = "none"
    js_beta: float = 0.5
    top_k: int | None = None
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    chunk_size: int = 256
    reduce_grad: bool = True
    """Sum the gradient of the hidden state over the group; False where the caller does (the
    backward of Megatron's sequence-parallel gather is a reduce-scatter)."""

    @classmethod
    def of(cls, config: DistillationConfig, *, reduce_grad: bool) -> "LogitLossConfig":
        """From the keys of the stage."""
        return cls(
            loss=config.loss,
            temperature=config.temperature,
            temperature_scaling=config.temperature_scaling,
            js_beta=config.js_beta,
            top_k=config.top_k,
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            chunk_size=config.chunk_size,
            reduce_grad=reduce_grad,
        )

    @property
    def kd_scale(self) -> float:
        """Factor of the distillation loss itself: temperature^2 where that was asked for."""
        return self.temperature**2 if self.temperature_scaling == "square" else 1.0

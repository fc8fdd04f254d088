"""A family, a criterion and a loss.

Pocket is a Llama that rotates no queries and keys. ``read_weights`` scores a channel as Wanda does
(2306.11695): by its activations and the weights that read them. The loss is the Jeffreys
divergence.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from nemo_minitron.config.distillation import DistillationConfig
from nemo_minitron.config.model import ModelConfig
from nemo_minitron.distillation.divergences import forward_kl, reverse_kl
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.families.llama import READS, ROWS, dense
from nemo_minitron.families.llama import to_hf as llama_to_hf
from nemo_minitron.families.table import Family

NAMES = {"PocketForCausalLM": "pocket"}


def from_hf(hf: dict[str, Any]) -> ModelConfig:
    """Read the sizes of a config.json."""
    sizes = dense(hf)
    return replace(sizes, family="pocket", no_rope_freq=[1] * sizes.num_layers)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """Write config.json of a (pruned) model."""
    named = {"architectures": list(NAMES), "model_type": "pocket"}
    return {**llama_to_hf(config), **named}


POCKET = Family("pocket", NAMES, ROWS, from_hf, to_hf, READS, models="Pocket")


def read_weights(values: Tensor, linear: nn.Module) -> Tensor:
    """Activation times the L2 norm of its column of the weight, as ``aggregate.Criterion`` says."""
    return values * linear.weight.double().norm(dim=0)


def jeffreys(
    student: Tensor, teacher: Tensor, weight: Tensor, config: DistillationConfig, shard: VocabShard
) -> tuple[Tensor, Tensor]:
    """KL(teacher || student) + KL(student || teacher), as ``divergences.LossFunction`` says."""
    one, gradient = forward_kl(student.clone(), teacher.clone(), weight, config, shard)
    other, more = reverse_kl(student, teacher, weight, config, shard)
    return one + other, gradient + more

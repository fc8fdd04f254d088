"""The teacher's k largest logits of each token, from a resident teacher or from disk.

Torch only. Letters: N tokens, c tokens of a chunk, k entries, v local vocabulary rows.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TopKTargets:
    """The same on every rank of the tensor-parallel group.

    Attributes:
        values: ``[N, k]`` fp32 raw teacher logits (temperature 1), largest first.
        ids: ``[N, k]`` int64 global vocabulary ids, different within a token.
        log_z: ``[N]`` fp32 log of the sum of ``exp(logit / temperature)`` over the whole
            vocabulary. Only ``top_k_tail`` reads it.
        temperature: at which ``log_z`` was taken. The normaliser at one temperature does not tell
            that at another, so ``top_k_tail`` refuses any other temperature.
    """

    values: Tensor
    ids: Tensor
    log_z: Tensor
    temperature: float = 1.0

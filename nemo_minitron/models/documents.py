"""Samples that several documents share: none sees another, and each begins at position 0.

With Transformer Engine the documents are sequences of Megatron's packed format. The attention of
this package has a mask, made once for all layers of a micro-batch. Shape letters: b micro-batch, s
positions of a context-parallel rank, S positions of the whole sample.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from nemo_minitron.config.model import ModelConfig
from nemo_minitron.config.parallel import ParallelConfig
from nemo_minitron.config.training import DataConfig
from nemo_minitron.families.registry import family_of
from nemo_minitron.families.rope import BETA
from nemo_minitron.models.attention import causal_mask, gathered_positions, zigzag_positions
from nemo_minitron.models.spec import HAVE_TE

DOCUMENTS = "documents"
"""Key of a batch: ``[b, S]`` number of the document at each position, whole on every rank."""


@dataclass
class SharedSamples(PackedSeqParams):
    """Documents of a micro-batch in the ordinary layout of Megatron's activations."""

    documents: Tensor | None = None
    """``[b, S]``, in the order of positions."""
    group: Any = None
    """The context-parallel group."""
    masks: dict[int | None, Tensor] = field(default_factory=dict)
    """Mask of each size of window."""

    def mask(self, local_length: int, window: int | None) -> Tensor:
        """Return ``[b, 1, s, S]``: true where a query of this rank sees a key, in gathered order.

        Args:
            local_length: positions of this rank.
            window: tokens that a query sees, itself and those before it; None is all of them.
        """
        if window not in self.masks:
            assert self.documents is not None
            device, rank = self.documents.device, self.group.rank()
            keys = self.documents[:, gathered_positions(local_length, self.group.size(), device)]
            queries = keys[:, rank * local_length : (rank + 1) * local_length]
            seen = causal_mask(local_length, self.group, device, window)
            self.masks[window] = ((queries[:, :, None] == keys[:, None, :]) & seen)[:, None]
        return self.masks[window]

    def positions(self, local_length: int) -> Tensor:
        """Return ``[b, s]``: positions of this rank's tokens in their documents."""
        assert self.documents is not None
        whole = torch.arange(self.documents.size(1), device=self.documents.device)
        begins = self.documents[:, 1:] != self.documents[:, :-1]
        first = F.pad(begins * whole[1:], (1, 0)).cummax(dim=1).values
        mine = zigzag_positions(
            local_length, self.group.rank(), self.group.size(), self.documents.device
        )
        return (whole - first)[:, mine]


def shared_samples(chunk: Any, documents: Tensor | None) -> PackedSeqParams | None:
    """Return the document boundaries for every layer; None if each sample is one document.

    Args:
        chunk: the model, unwrapped.
        documents: ``[b, S]``, or None.
    """
    if documents is None:
        return None
    length = documents.size(1)
    if not HAVE_TE:
        return SharedSamples(
            qkv_format="sbhd",
            max_seqlen_q=length,
            max_seqlen_kv=length,
            documents=documents,
            group=chunk.pg_collection.cp,
        )
    # The host waits here, once per micro-batch: the number of documents is a shape.
    begins = torch.nonzero(documents[0, 1:] != documents[0, :-1]).flatten() + 1
    bounds = F.pad(F.pad(begins, (1, 0)), (0, 1), value=length).int()
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=length,
        max_seqlen_kv=length,
    )


def rotary_of_positions(rotary: Tensor, position_ids: Tensor) -> Tensor:
    """Return the rotation at each position.

    Args:
        rotary: ``[S, 1, 1, d]`` angles of all positions.
        position_ids: ``[b, s]``.

    Returns:
        ``[s, b, 1, d]``.
    """
    return rotary[:, 0][position_ids.t()]


def check_shared(
    samples: object, data: DataConfig, model: ModelConfig, parallel: ParallelConfig
) -> None:
    """Refuse documents that share samples where attention cannot part them.

    That of Transformer Engine cannot always, and LongRoPE has one rotation for all.

    Args:
        samples: of a stage.
        data: its data keys.
        model: sizes of a model that reads them.
        parallel: its layout.

    Raises:
        ValueError: names the key and the way out.
    """
    if not getattr(samples, "shared", False):
        return
    longest = model.longrope_length
    if longest is not None and data.seq_length > longest:
        raise ValueError(
            f"data.pack=true with data.seq_length={data.seq_length} above "
            f"original_max_position_embeddings={longest} is not supported with rope_scaling of "
            "type longrope, which rotates each document by its own length; set data.pack=false, or "
            f"data.seq_length={longest}"
        )
    if not HAVE_TE:
        return
    problems = {
        f"data.micro_batch_size={data.micro_batch_size}": data.micro_batch_size > 1,
        f"parallel.context_parallel_size={parallel.context_parallel_size}": (
            parallel.context_parallel_size > 1
        ),
        "caps on the scores of attention (attn_logit_softcapping)": (
            model.attn_logit_softcapping is not None
        ),
        "multi-latent attention": model.multi_latent,
        "queries that are scaled by position": BETA in (model.rope_scaling or {}),
        "attention sinks": "softmax_type" in family_of(model).megatron,
    }
    for what, found in problems.items():
        if found:
            raise ValueError(
                f"data.pack=true is not supported with {what} under Transformer Engine; set "
                "data.pack=false, or the size to 1"
            )

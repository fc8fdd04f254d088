"""The teacher's largest logits of every sample, shard by shard, on any layout."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import default_collate

from nemo_minitron.checkpoint.seals import check_seal
from nemo_minitron.data.datasets import SampleSet
from nemo_minitron.distillation.logit_index import (
    Part,
    shard_name,
    shard_numbers,
    shard_range,
)
from nemo_minitron.distillation.logit_loss import capped_
from nemo_minitron.distillation.logit_shards import (
    read_hashes,
    sample_hash,
    shard_hash,
    write_shard,
)
from nemo_minitron.distillation.top_k import top_k_targets
from nemo_minitron.distillation.vocab import VocabShard
from nemo_minitron.models.attention import zigzag_positions
from nemo_minitron.models.build import HiddenGPTModel
from nemo_minitron.models.schedule import Batch, gathered_hidden, on_this_cp_rank, run_schedule
from nemo_minitron.runtime.agreement import from_first
from nemo_minitron.runtime.groups import ParallelGroups
from nemo_minitron.runtime.launch import device
from nemo_minitron.runtime.worlds import barrier

_READERS = 4  # threads that read shards of an earlier run


@dataclass(frozen=True, kw_only=True)
class Storing:
    """How outputs are made and stored; see ``config.stages.TeacherLogitsConfig``."""

    top_k: int
    temperature: float
    dtype: torch.dtype
    shard_samples: int
    chunk_size: int
    micro_batch_size: int


class LogitWriter:
    """Runs a frozen model over samples and writes what is not yet written.

    Every data-parallel rank makes whole shards, so none waits for samples of another. The ranks
    still go through Megatron's schedule together, with fillers where one has no samples left:
    experts may be spread over them.
    """

    def __init__(
        self,
        chunks: list[HiddenGPTModel],
        groups: ParallelGroups,
        vocab_size: int,
        storing: Storing,
        folder: Path,
    ) -> None:
        """Take a model that returns hidden states, in eval mode.

        Args:
            chunks: this rank's part of the model.
            groups: this rank's process groups.
            vocab_size: true vocabulary.
            storing: how.
            folder: where shards go; it exists.
        """
        self.chunks, self.groups, self.storing, self.folder = chunks, groups, storing, folder
        self.shard = None
        if groups.is_last_stage:
            rows = chunks[-1].output_weight().size(0)
            self.shard = VocabShard(groups.tp, vocab_size, rows)

    @torch.no_grad()
    def write(
        self,
        part: str,
        dataset: SampleSet,
        advance: Callable[[int], None],
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Write the missing shards of a part (collective; every rank sees ``folder``).

        Args:
            part: ``train`` or ``validation``.
            dataset: all its samples, of all ranks, in global order.
            advance: told how many samples are done, those of an earlier run included.
            between: called on every rank after each shard.
        """
        samples = len(dataset)
        missing = self._missing(part, samples)
        advance(samples - sum(len(self._range(number, samples)) for number in missing))
        dp = self.groups.dp
        for first in range(0, len(missing), dp.size()):
            numbers = missing[first : first + dp.size()]
            ranges = [self._range(number, samples) for number in numbers]
            mine = ranges[dp.rank()] if dp.rank() < len(ranges) else range(0)
            found = self._outputs(dataset, mine, max(map(len, ranges)))
            if found is not None and mine:
                write_shard(self.folder / shard_name(part, numbers[dp.rank()]), found)
            advance(sum(map(len, ranges)))
            between()
        barrier()

    def _range(self, number: int, samples: int) -> range:
        return shard_range(number, self.storing.shard_samples, samples)

    def _missing(self, part: str, samples: int) -> list[int]:
        """Return shards to write, as rank 0 sees them; it reads those that are there.

        Raises:
            ValueError: one of them is damaged.
        """
        numbers = shard_numbers(self.storing.shard_samples, samples)
        paths = {number: self.folder / shard_name(part, number) for number in numbers}

        def look() -> list[int]:
            there = [path for path in paths.values() if path.exists()]
            remedy = "remove it, then the same command writes it again"
            with ThreadPoolExecutor(_READERS) as pool:
                list(pool.map(lambda path: check_seal(path, remedy), there))
            return [number for number, path in paths.items() if path not in there]

        return from_first(look)

    def _outputs(self, dataset: SampleSet, mine: range, longest: int) -> dict[str, Tensor] | None:
        """Tensors of a shard on the rank that writes it, else None.

        Args:
            dataset: all samples.
            mine: samples of this data-parallel rank's shard; may be empty.
            longest: samples of the largest shard that any rank makes now.
        """
        full = self._micro_batches(dataset, mine, longest)
        local = [on_this_cp_rank(batch, self.groups) for batch in full]
        outputs = run_schedule(
            self.chunks, local, self._collect, forward_only=True, collect_outputs=True
        )
        if not outputs or self.groups.tp.rank() or self.groups.cp.rank() or not mine:
            return None
        rows = len(mine)
        found = {name: torch.cat([o[name] for o in outputs])[:rows] for name in outputs[0]}
        hashes = [sample_hash(tokens) for batch in full for tokens in batch["tokens"].cpu()]
        return {**found, "tokens": torch.tensor(hashes[:rows])}

    def _micro_batches(self, dataset: SampleSet, mine: range, longest: int) -> list[Batch]:
        """Return as many micro-batches on every rank; filler samples complete the last ones."""
        size = self.storing.micro_batch_size
        count = -(-longest // size)
        if len(self.chunks) > 1:  # the interleaved schedule takes multiples of the stages
            count = -(-count // self.groups.pp.size()) * self.groups.pp.size()
        indices: Sequence[int | None] = [*mine, *[None] * (count * size - len(mine))]
        batches = [
            default_collate([dataset[index] for index in indices[start : start + size]])
            for start in range(0, len(indices), size)
        ]
        return [{key: value.to(device()) for key, value in batch.items()} for batch in batches]

    def _collect(self, index: int, batch: Batch, hidden: Tensor) -> dict[str, Tensor]:
        """``values`` and ``ids`` ``[b, s, k]``, ``log_z`` ``[b, s]`` of a micro-batch, on the host.

        Last stage only. Logits of at most ``chunk_size`` tokens exist at one time.
        """
        assert self.shard is not None
        rows = gathered_hidden(hidden, self.chunks[-1])
        weight = self.chunks[-1].output_weight()[: self.shard.valid]
        storing, b = self.storing, batch["tokens"].size(0)
        parts = []
        for chunk in rows.split(storing.chunk_size):
            logits = capped_((chunk @ weight.t()).float(), self.chunks[-1].logit_cap)
            parts.append(top_k_targets(logits, storing.top_k, storing.temperature, self.shard))
        found = {
            "values": torch.cat([part.values for part in parts]).to(storing.dtype),
            "ids": torch.cat([part.ids for part in parts]).int(),
            "log_z": torch.cat([part.log_z for part in parts]).float(),
        }
        return {
            name: self._whole_sequence(x.unflatten(0, (-1, b)).transpose(0, 1)).cpu()
            for name, x in found.items()
        }

    def _whole_sequence(self, local: Tensor) -> Tensor:
        """``[b, s, ...]`` from the parts ``[b, s / cp, ...]`` of the context-parallel ranks."""
        cp, length = self.groups.cp, local.size(1)
        if cp.size() == 1:
            return local
        parts = [
            torch.empty_like(local, memory_format=torch.contiguous_format) for _ in range(cp.size())
        ]
        dist.all_gather(parts, local.contiguous(), group=cp)
        positions = [zigzag_positions(length, rank, cp.size()) for rank in range(cp.size())]
        order = torch.cat(positions).argsort().to(local.device)
        return torch.cat(parts, 1).index_select(1, order)


def read_part(folder: Path, part: str, shard_samples: int, samples: int) -> Part:
    """Entry of a part in the index, from its shards (rank 0)."""
    numbers = shard_numbers(shard_samples, samples)
    hashes = [shard_hash(read_hashes(folder / shard_name(part, number))) for number in numbers]
    return Part(samples=samples, tokens=hashes)

"""Continuations of many prompts, file by file, on any layout that can generate."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemo_minitron.checkpoint.seals import check_seal, sealed_file
from nemo_minitron.documents import json_value
from nemo_minitron.models.inference import CachedModel, Sampling, continue_prompts, draws_of
from nemo_minitron.runtime.agreement import from_first
from nemo_minitron.runtime.worlds import barrier


def read_samples(folder: Path) -> dict[int, list[int]]:
    """Return new tokens of every sample that was written, by its number.

    Raises:
        ValueError: a file is damaged.
    """
    found: dict[int, list[int]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        check_seal(file, "remove it, then the same command writes its samples again")
        for line in file.read_text().splitlines():
            record = json_value(line)
            found[record["index"]] = record["ids"]
    return found


class SampleWriter:
    """Writes what is not yet written; files appear whole or not at all."""

    def __init__(
        self,
        model: CachedModel,
        prompts: list[list[int]],
        sampling: Sampling,
        stops: frozenset[int],
        *,
        seed: int,
        max_new_tokens: int,
        batch_size: int,
        folder: Path,
    ) -> None:
        """Take the model and what to do with it.

        Args:
            model: every rank of a replica takes part.
            prompts: token ids of every sample's prompt.
            sampling: how tokens are drawn.
            stops: tokens that end a sample.
            seed: with the number of a sample it fixes its random numbers.
            max_new_tokens: of a sample.
            batch_size: samples that go together.
            folder: where files go; every rank sees it.
        """
        self.model, self.prompts, self.sampling, self.stops = model, prompts, sampling, stops
        self.seed, self.new, self.batch_size = seed, max_new_tokens, batch_size
        self.folder = folder

    def write(
        self,
        samples_per_file: int,
        advance: Callable[[int], None],
        between: Callable[[], None] = lambda: None,
    ) -> int:
        """Write the missing samples (collective).

        Args:
            samples_per_file: of each file and data-parallel rank.
            advance: told how many samples are done, those of an earlier run included.
            between: called on every rank after each file.

        Returns:
            New tokens of all ranks in this run.
        """
        missing = self._missing()
        advance(len(self.prompts) - len(missing))
        dp, tokens = self.model.groups.dp, 0
        for start in range(0, len(missing), samples_per_file * dp.size()):
            together = missing[start : start + samples_per_file * dp.size()]
            mine = together[dp.rank() :: dp.size()]
            found = self._continuations(mine)
            if mine and self._writes():
                self._save(found)
            advance(len(together))
            tokens += sum(map(len, found.values()))
            between()
        barrier()
        counts: list[Any] = [None] * dp.size()
        dist.all_gather_object(counts, tokens, group=dp)
        return sum(counts)

    def _missing(self) -> list[int]:
        """Return numbers of the samples to write, as rank 0 sees them (collective)."""

        def look() -> list[int]:
            self.folder.mkdir(exist_ok=True)
            written = read_samples(self.folder)
            return [index for index in range(len(self.prompts)) if index not in written]

        return from_first(look)

    def _continuations(self, indices: list[int]) -> dict[int, list[int]]:
        """Return new tokens by sample; prompts of similar length go together."""
        order = sorted(indices, key=lambda index: (len(self.prompts[index]), index))
        found: dict[int, list[int]] = {}
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            draws = torch.stack([draws_of(self.seed, index, self.new) for index in batch])
            prompts = [self.prompts[index] for index in batch]
            ids = continue_prompts(self.model, prompts, self.sampling, draws, self.stops)
            found |= dict(zip(batch, ids, strict=True))
        return found

    def _writes(self) -> bool:
        """Whether this rank is the one of its replica that writes."""
        return self.model.groups.tp.rank() == 0 and self.model.groups.pp.rank() == 0

    def _save(self, found: dict[int, list[int]]) -> None:
        lines = [json.dumps({"index": index, "ids": ids}) for index, ids in sorted(found.items())]
        with sealed_file(self.folder / f"{min(found)}.jsonl") as draft:
            draft.write_text("\n".join([*lines, ""]))

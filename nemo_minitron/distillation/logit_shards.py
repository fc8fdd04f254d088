"""Shards of stored teacher outputs: written whole or not at all, read beside a sample's tokens.

A shard is a safetensors file of n consecutive samples: ``values [n, s, k]`` (raw logits, largest
first), ``ids [n, s, k]`` int32, ``log_z [n, s]`` fp32 and ``tokens [n]`` int64, a hash of the
tokens of each sample. Torch only.
"""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from nemo_minitron.checkpoint.seals import sealed_file
from nemo_minitron.distillation.logit_index import LogitIndex, shard_name, shard_range
from nemo_minitron.distillation.top_k import TopKTargets

Sample = dict[str, Tensor]


def sample_hash(tokens: Tensor) -> int:
    """Return 64 bits that stand for the ``[s]`` token ids of a sample."""
    data = tokens.to(torch.int64).contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def shard_hash(hashes: Tensor) -> str:
    """Return the hash of all tokens of a shard, from the ``[n]`` hashes of its samples."""
    return hashlib.sha256(hashes.contiguous().numpy().tobytes()).hexdigest()[:32]


def write_shard(path: Path, tensors: Sample) -> None:
    """Write a shard; it appears under its name complete and on disk, or not at all."""
    with sealed_file(path) as draft:
        draft.touch()
        mode = draft.stat().st_mode
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
        draft.chmod(mode)  # safetensors makes files that only their owner can read


def read_hashes(path: Path) -> Tensor:
    """Return ``[n]`` hashes of the samples of a shard."""
    with _opened(path) as file:
        return file.get_tensor("tokens")


def _opened(path: Path) -> Any:
    """Return a shard, memory-mapped.

    Raises:
        ValueError: it is missing or damaged.
    """
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); restore the file, or run teacher_logits again with "
            "overwrite=true"
        ) from error


class _Samples(Protocol):
    """The samples of a split."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int | None, /) -> Sample: ...


class StoredTeacher(Dataset[Sample]):
    """The samples of a split with what the teacher made of them.

    Adds ``teacher_values [s, k]``, ``teacher_ids [s, k]`` and ``teacher_log_z [s]`` to each sample;
    a filler (index None) gets those of sample 0, whatever its tokens are, its loss mask being 0.
    """

    def __init__(
        self,
        dataset: _Samples,
        folder: Path,
        part: str,
        *,
        top_k: int | None,
        data_path: str,
    ) -> None:
        """Join samples and shards.

        Args:
            dataset: samples of the split, as ``distill`` reads them.
            folder: ``logits/`` of a result.
            part: ``train`` or ``validation``.
            top_k: logits to read of each token, the largest ones; None takes all.
            data_path: where the samples come from, for messages.

        Raises:
            ValueError: the part holds fewer samples, or the first or the last one has other tokens.
        """
        self.dataset, self.folder, self.part = dataset, folder, part
        self.index, self.top_k, self.data_path = LogitIndex.load(folder), top_k, data_path
        self._open: tuple[int, Any] = (-1, None)
        held = self.index.parts[part].samples
        if len(dataset) > held:
            raise ValueError(
                f"teacher_logits={folder.parent} holds {held} {part} samples, fewer than the "
                f"{len(dataset)} of this run; set trainer.* and data.* as they were for "
                "teacher_logits, or run teacher_logits again"
            )
        for sample in {0, len(dataset) - 1}:
            self[sample]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index``, or a filler for None.

        Raises:
            ValueError: the stored outputs belong to other tokens.
        """
        sample: Sample = self.dataset[index]
        number, row = divmod(index or 0, self.index.shard_samples)
        shard = self._shard(number)
        stored = int(shard.get_slice("tokens")[row])
        if index is not None and stored != sample_hash(sample["tokens"]):
            raise self._mismatch(index)
        found = {
            "teacher_values": shard.get_slice("values")[row, :, : self.top_k].float(),
            "teacher_ids": shard.get_slice("ids")[row, :, : self.top_k],
            "teacher_log_z": shard.get_slice("log_z")[row],
        }
        return {**sample, **found}

    def _shard(self, number: int) -> Any:
        """Return a shard and keep it open, one at a time: samples are read in order."""
        if self._open[0] != number:
            path = self.folder / shard_name(self.part, number)
            shard = _opened(path)
            self._check_shape(path, number, shard)
            self._open = (number, shard)
        return self._open[1]

    def _check_shape(self, path: Path, number: int, shard: safe_open) -> None:
        samples = self.index.parts[self.part].samples
        rows = len(shard_range(number, self.index.shard_samples, samples))
        want = [rows, self.index.seq_length, self.index.top_k]
        if shard.get_slice("values").get_shape() != want:
            raise ValueError(
                f"{path} is not the shard that {self.folder}/index.json describes; run "
                "teacher_logits again with overwrite=true"
            )

    def _mismatch(self, index: int) -> ValueError:
        return ValueError(
            f"teacher_logits={self.folder.parent} was made from other tokens: {self.part} sample "
            f"{index} of data.path={self.data_path} differs; set data.path, trainer.max_steps and "
            "data.global_batch_size as they were for teacher_logits, or run teacher_logits again"
        )


def stored_targets(batch: Sample, temperature: float) -> TopKTargets:
    """Return targets of a micro-batch in the token order of a flattened ``[s, b, h]`` state.

    Args:
        batch: ``teacher_values`` and ``teacher_ids`` ``[b, s, k]``, ``teacher_log_z`` ``[b, s]``,
            local to the context-parallel rank.
        temperature: at which the normalisers were taken.
    """
    values, ids, log_z = (
        batch[name].transpose(0, 1).flatten(0, 1)
        for name in ("teacher_values", "teacher_ids", "teacher_log_z")
    )
    return TopKTargets(values, ids.long(), log_z, temperature)

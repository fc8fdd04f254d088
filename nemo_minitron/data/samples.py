"""The form of a sample, samples stored as rows of token ids, and views of other samples."""

import numpy as np
import torch
from torch.utils.data import Dataset

Sample = dict[str, torch.Tensor]


class NpyDataset(Dataset[Sample]):
    """Rows of token ids, taken as they are: sample ``i`` is row ``i % rows``.

    The label of a position is the next token of the row; the last position has none, so its loss
    mask is 0.
    """

    def __init__(self, ids: np.ndarray, size: int) -> None:
        """Wrap an array.

        Args:
            ids: integers ``[rows, seq_length]``, possibly memory-mapped.
            size: samples.
        """
        self.ids = ids
        self.size = size

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.size

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index``, or for None a filler whose loss mask is all 0."""
        tokens = torch.from_numpy(self.ids[(index or 0) % len(self.ids)].astype(np.int64))
        labels = torch.zeros_like(tokens)
        labels[:-1] = tokens[1:]
        loss_mask = torch.full(tokens.shape, 0.0 if index is None else 1.0)
        loss_mask[-1] = 0.0
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": torch.arange(len(tokens)),
        }


class FirstSamples(Dataset[Sample]):
    """The first ``size`` samples of a dataset.

    Unlike ``torch.utils.data.Subset`` it passes the index None on, which stands for a filler.
    """

    def __init__(self, dataset: Dataset[Sample], size: int) -> None:
        """Wrap a dataset of at least ``size`` samples."""
        self.dataset, self.size = dataset, size

    def __len__(self) -> int:
        """Return the number of samples."""
        return self.size

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index``, or for None a filler whose loss mask is all 0."""
        return self.dataset[index]


class WholeDocument(Dataset[Sample]):
    """Samples of one document each, for a place beside samples that documents share."""

    def __init__(self, dataset: Dataset[Sample]) -> None:
        """Wrap a dataset whose samples do not say what their documents are."""
        self.dataset = dataset

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length

    def __getitem__(self, index: int | None) -> Sample:
        """Return sample ``index`` with its ``documents``, all 0."""
        sample = self.dataset[index]
        return {**sample, "documents": torch.zeros_like(sample["tokens"])}

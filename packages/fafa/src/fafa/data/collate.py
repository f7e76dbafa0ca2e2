"""Batches of triplets, and the loader that makes them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate

from tbps_common.errors import DatasetError
from tbps_common.run.batches import EpochBatches, SeededItems


def collate_fn(items: Sequence[Any]) -> Any:
    """Stack the items that could be loaded.

    Args:
        items: triplets of `SynCPRDataset`, None for those that could not be loaded.

    Returns:
        References `[B, 3, d, d]`, targets `[B, 3, d, d]`, B captions, and int64 `[B]` group ids.

    Raises:
        DatasetError: no item of the batch could be loaded.
    """
    usable = [item for item in items if item is not None]
    if not usable:
        raise DatasetError(
            f"none of the {len(items)} triplets of a batch could be loaded (the log names each cause): check the images "
            "under --syncpr-data-path and their size"
        )
    return default_collate(usable)


def train_loader(
    dataset: Dataset[Any], batches: EpochBatches, num_workers: int, device: torch.device
) -> DataLoader[Any]:
    """The loader of a run; `batches` decides where in which epoch it begins.

    Args:
        dataset: triplets.
        batches: which items make up the batches of this process.
        num_workers: processes that load.
        device: where the batches will go.
    """
    return DataLoader(
        SeededItems(dataset),
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=device.type == "cuda",
        persistent_workers=num_workers > 0,
        generator=torch.Generator(),  # making an iterator would otherwise draw from the numbers of drop-out
    )

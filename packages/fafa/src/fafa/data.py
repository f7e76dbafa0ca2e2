"""The data of composed person retrieval: SynCPR's triplets to train on, ITCPR's queries and gallery to test on."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import default_collate

from fafa.options import BAD_IMAGES
from fafa.transforms import Transform
from tbps_common.datasets import ITCPR, SynCPRRecord, load_syncpr
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image
from tbps_common.run.batches import EpochBatches, SeededItems

logger = logging.getLogger("fafa.data")

Triplet = tuple[Tensor | Image.Image, Tensor | Image.Image, str, int]


class SynCPRDataset(Dataset[Triplet | None]):
    """Training triplets `(reference, target, edit caption, cpr_id)`.

    The reference is transformed before the target, which fixes the order of random draws. A triplet that cannot be
    loaded is logged and becomes None; `fafa.data.collate_fn` leaves it out of its batch.

    Args:
        data_path: folder that the annotation's image paths are relative to.
        json_path: annotation file, relative to `data_path` or absolute.
        split: only `train` exists.
        mode: only `relative` exists: reference and target with the relative caption.
        preprocess: picture to tensor; without it items hold PIL pictures.
        setting: accepted and unused, as in the released code.
        records: the annotation, if it has been read already.
        on_error: `drop` as above, or `stop`: the exception of a triplet that cannot be loaded ends the run.

    Raises:
        DatasetError: the annotation is missing, damaged or empty.
        InputError: another split or mode.
    """

    def __init__(
        self,
        data_path: str | os.PathLike[str],
        json_path: str | os.PathLike[str] = "SynCPR.json",
        split: str = "train",
        mode: str = "relative",
        preprocess: Transform | None = None,
        setting: Any = None,
        *,
        records: Sequence[SynCPRRecord] | None = None,
        on_error: str = "drop",
    ):
        if split != "train" or mode != "relative":
            raise InputError(f"SynCPR has split 'train' and mode 'relative' only, not {split!r} and {mode!r}")
        if on_error not in BAD_IMAGES:
            raise InputError(f"on_error must be one of {', '.join(BAD_IMAGES)}, not {on_error!r}")
        if records is None:
            records = load_syncpr(data_path, json_path)
        if not records:
            raise DatasetError(
                f"{os.path.join(data_path, json_path)} holds no triplets, so there is nothing to train on"
            )
        self.preprocess = preprocess
        self.on_error = on_error
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Triplet | None:
        record = self.records[index]
        try:
            reference = self._load(record.reference_image_path)
            target = self._load(record.target_image_path)
        except Exception as error:
            if self.on_error == "stop":
                raise DatasetError(
                    f"training triplet {index} cannot be used: {error}; repair it, or leave such triplets out with "
                    "--bad-images drop"
                ) from error
            logger.warning("training triplet %d is left out: %s", index, error)
            return None
        return reference, target, record.edit_caption, record.cpr_id

    def _load(self, path: str) -> Tensor | Image.Image:
        image = read_image(path)
        if self.preprocess is None:
            return image
        try:
            return self.preprocess(image)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def collate_fn(items: Sequence[Any]) -> Any:
    """Stack the items that could be loaded.

    Args:
        items: triplets of `SynCPRDataset`, None for those that could not be loaded.

    Returns:
        References and targets `[B, 3, d, d]`, as the transform gives them; B captions, and int64 `[B]` group ids.

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


class MissingITCPR(DatasetError, RuntimeError):
    """The folder or a file of ITCPR is not there; a RuntimeError too, which the released code raises."""


class ITCPRDataset(ITCPR):
    """The annotation of ITCPR: attributes `query` and `gallery`, each a dict of lists (see `tbps_common`).

    Args:
        root: `query.json`, `gallery.json` and the picture folders lie here (README) or in its folder `datasets`.
        verbose: log the table of sizes.

    Raises:
        MissingITCPR: the folder or a file is absent.
        DatasetError: a record cannot be used.
    """

    def __init__(self, root: str | os.PathLike[str], verbose: bool = True):
        nested = os.path.join(root, "datasets")
        folder = nested if os.path.isfile(os.path.join(nested, "query.json")) else os.fspath(root)
        if not os.path.isdir(folder):
            raise MissingITCPR(
                f"the ITCPR folder {folder} does not exist: give the folder of query.json and gallery.json with "
                "--itcpr-root (fafa-itcpr prepare makes it)"
            )
        for name in ("query.json", "gallery.json"):
            if not os.path.isfile(os.path.join(folder, name)):
                raise MissingITCPR(
                    f"{os.path.join(folder, name)} does not exist: ITCPR needs query.json and gallery.json, from the data "
                    "set a1557811266/ITCPR on the Hugging Face hub"
                )
        super().__init__(root, verbose=verbose)


class GalleryDataset(Dataset[tuple[int, Tensor]]):
    """Items `(instance_id, picture)`.

    Args:
        instance_ids: link a picture to the query it answers; -1 for a distractor.
        img_paths: the pictures.
        preprocess: picture to tensor.

    Raises:
        DatasetError: from an item whose picture cannot be read, after a few attempts.
    """

    def __init__(self, instance_ids: Sequence[int], img_paths: Sequence[str], preprocess: Transform):
        self.instance_ids, self.img_paths, self.preprocess = instance_ids, img_paths, preprocess

    def __len__(self) -> int:
        return len(self.instance_ids)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        image = read_image(self.img_paths[index])
        return self.instance_ids[index], self.preprocess(image)


class QueryDataset(Dataset[tuple[int, Tensor, str]]):
    """Items `(instance_id, reference picture, relative caption)`; arguments and errors as for `GalleryDataset`."""

    def __init__(
        self, instance_ids: Sequence[int], img_paths: Sequence[str], captions: Sequence[str], preprocess: Transform
    ):
        self.instance_ids, self.img_paths, self.captions = instance_ids, img_paths, captions
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.instance_ids)

    def __getitem__(self, index: int) -> tuple[int, Tensor, str]:
        return self.instance_ids[index], self.preprocess(read_image(self.img_paths[index])), self.captions[index]

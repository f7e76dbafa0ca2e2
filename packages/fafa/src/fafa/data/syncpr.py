"""SynCPR, the synthetic training set: reference picture, target picture, edit caption, group id."""

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fafa.data.strings import PackedStrings
from fafa.options import BAD_IMAGES
from fafa.transforms import Transform
from tbps_common.datasets import SynCPRRecord, load_syncpr
from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image

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
                f"{os.path.join(data_path, json_path)} holds no triplet, so there is nothing to train on"
            )
        self.preprocess = preprocess
        self.on_error = on_error
        self._references = PackedStrings(record.reference_image_path for record in records)
        self._targets = PackedStrings(record.target_image_path for record in records)
        self._captions = PackedStrings(record.edit_caption for record in records)
        self._ids = np.array([record.cpr_id for record in records], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Triplet | None:
        try:
            reference = self._load(self._references[index])
            target = self._load(self._targets[index])
        except Exception as error:
            if self.on_error == "stop":
                raise DatasetError(
                    f"training triplet {index} cannot be used: {error}; repair it, or leave such triplets out with "
                    "--bad-images drop"
                ) from error
            logger.warning("training triplet %d is left out: %s", index, error)
            return None
        return reference, target, self._captions[index], int(self._ids[index])

    def _load(self, path: str) -> Tensor | Image.Image:
        image = read_image(path)
        if self.preprocess is None:
            return image
        try:
            return self.preprocess(image)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

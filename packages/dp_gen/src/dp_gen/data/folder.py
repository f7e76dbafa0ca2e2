"""One split of a training folder: images, masks, captions."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dp_gen.data.layout import FolderLayout
from tbps_common.errors import DatasetError
from tbps_common.images import read_image

_INT64_DIGITS = len(str(2**63))


class TrainingFolder(FolderLayout):
    """Reads whole samples; see `FolderLayout` for the files."""

    def __len__(self) -> int:
        return len(self.ids)

    def load(self, index: int) -> tuple[Tensor, dict[str, Any], Tensor, int]:
        """Sample `index` of the split.

        Returns:
            Image uint8 [3, h, w]; description and segments; mask uint8 [h, w]; the id as a number (the line number for
            an id that is none, or too long for an int64).

        Raises:
            DatasetError: a file is missing or damaged, or they do not fit each other.
        """
        img_id = self.ids[index]
        image = torch.from_numpy(np.array(read_image(self.image_path(img_id)))).permute(2, 0, 1).contiguous()
        info = self.read_info(img_id)
        seg_map = self.read_mask(img_id)
        if seg_map.shape != image.shape[1:]:
            raise DatasetError(
                f"{self.stem(img_id)}.npy is {seg_map.shape[0]} x {seg_map.shape[1]} and its image {image.shape[1]} x "
                f"{image.shape[2]} (rows x columns): both must have the same size"
            )
        number = int(img_id) if img_id.isdecimal() and len(img_id) < _INT64_DIGITS else index
        return image, info, seg_map, number

    def read_mask(self, img_id: str) -> Tensor:
        """The mask of a sample, uint8 [h, w].

        Raises:
            DatasetError: the file is damaged, or is not a 2-D array of integers from 0 to 255.
        """
        path = self.stem(img_id).parent / f"{img_id}.npy"
        try:
            mask = np.load(path, allow_pickle=False)
        except FileNotFoundError:
            raise DatasetError(f"{path} does not exist: copy it, or take {img_id} out of {self.id_file}") from None
        except Exception as error:  # damaged headers make numpy fail with many kinds of exception
            raise DatasetError(f"{path} cannot be read as a numpy array ({error}): make it again") from error
        if not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.dtype.kind not in "iub":
            shape = getattr(mask, "shape", "?")
            raise DatasetError(f"{path} must be a 2-D array of integers, not {shape} of {getattr(mask, 'dtype', '?')}")
        if mask.size and (mask.min() < 0 or mask.max() > 255):
            worst = mask.min() if mask.min() < 0 else mask.max()
            raise DatasetError(f"{path} holds the value {worst}: segment ids lie between 0 and 255")
        return torch.from_numpy(mask.astype(np.uint8))

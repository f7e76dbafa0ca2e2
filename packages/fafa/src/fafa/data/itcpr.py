"""ITCPR, the test set: queries of a picture and a relative caption, and a gallery."""

import os
from collections.abc import Sequence

from torch import Tensor
from torch.utils.data import Dataset

from fafa.transforms import Transform
from tbps_common.datasets import ITCPR
from tbps_common.errors import DatasetError
from tbps_common.images import read_image


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
        return self.instance_ids[index], self.preprocess(read_image(self.img_paths[index]))


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

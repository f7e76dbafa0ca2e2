"""Features of a gallery, batch by batch."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diana.model.diana import DiaNAModel
from diana.retrieval.features import evaluating, finished, in_halves
from tbps_common.errors import DatasetError
from tbps_common.images import read_image
from tbps_common.run.batches import usable_workers

logger = logging.getLogger("diana.retrieval")


class _Pictures(Dataset[Any]):
    """Path and tensor, or path and error: an exception raised in a worker would arrive wrapped in its traceback."""

    def __init__(self, paths: Sequence[str], transform: Any, as_shown: bool) -> None:
        self.paths, self.transform, self.as_shown = paths, transform, as_shown

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | DatasetError]:
        path = self.paths[index]
        try:
            return path, self.transform(read_image(path, as_shown=self.as_shown))
        except DatasetError as error:
            return path, error


def _stacked(items: list[tuple[str, Tensor | DatasetError]]) -> tuple[list[str], Tensor | None, list[DatasetError]]:
    """Paths and pictures that could be read, and the errors of the others."""
    paths = [path for path, picture in items if isinstance(picture, Tensor)]
    pictures = [picture for _, picture in items if isinstance(picture, Tensor)]
    errors = [picture for _, picture in items if isinstance(picture, DatasetError)]
    return paths, torch.stack(pictures) if pictures else None, errors


def encode_images(
    model: DiaNAModel,
    paths: Sequence[str],
    transform: Any,
    *,
    batch_size: int,
    num_workers: int = 0,
    attributes: bool = False,
    sim_dtype: str = "fp32",
    skip_unreadable: bool = False,
    as_shown: bool = False,
    progress: bool = False,
) -> Iterator[tuple[list[str], Tensor, Tensor | None]]:
    """Encode images in the order given; a batch that does not fit memory is encoded in halves.

    Args:
        model: where it is, it computes.
        paths: of the image files.
        transform: see `diana.data.build_eval_transform`.
        batch_size: images at a time.
        num_workers: processes that read images.
        attributes: also give the refiner's attributes.
        sim_dtype: `fp32`, or `native` for features in the model's dtype.
        skip_unreadable: leave an image that cannot be read out, with a warning, instead of stopping.
        as_shown: read a user's own pictures as a viewer shows them, see `tbps_common.images.read_image`.
        progress: show a bar on stderr.

    Yields:
        Paths of a batch, unit-norm features `[B, D]`, and unit-norm attributes `[B, K, D]` or None; on the CPU.

    Raises:
        DatasetError: an image cannot be read.
        InputError: attributes of a model without refiner.
    """

    def run(pictures: Tensor) -> tuple[Tensor, Tensor | None]:
        embeds, dense = model.encode_image(pictures)
        refined = finished(model.refine(dense), sim_dtype) if attributes else None
        return finished(embeds, sim_dtype), refined

    loader = DataLoader(
        _Pictures(paths, transform, as_shown),
        batch_size=batch_size,
        num_workers=usable_workers(num_workers),
        collate_fn=_stacked,
        pin_memory=model.device.type == "cuda",
    )
    with tqdm(total=len(paths), unit="image", disable=not progress) as bar:
        for read, pictures, errors in loader:
            if errors and not skip_unreadable:
                raise errors[0]
            for error in errors:
                logger.warning("left out: %s", error)
            if pictures is not None:
                with evaluating(model):
                    parts = in_halves(run, pictures)
                embeds = torch.cat([part[0] for part in parts])
                refined = [part[1] for part in parts if part[1] is not None]
                yield read, embeds, torch.cat(refined) if refined else None
            bar.update(len(read) + len(errors))

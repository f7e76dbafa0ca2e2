"""Features of a gallery, batch by batch."""

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


class _Pictures(Dataset[Any]):
    """Path and tensor, or path and error: an exception raised in a worker would arrive wrapped in its traceback."""

    def __init__(self, paths: Sequence[str], transform: Any) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor | DatasetError]:
        path = self.paths[index]
        try:
            return path, self.transform(read_image(path))
        except DatasetError as error:
            return path, error


def _stacked(items: list[tuple[str, Tensor | DatasetError]]) -> tuple[list[str], Tensor, list[DatasetError]]:
    """Paths, pictures, and what is wrong with those that could not be read."""
    pictures = [picture for _, picture in items if isinstance(picture, Tensor)]
    errors = [picture for _, picture in items if isinstance(picture, DatasetError)]
    return [path for path, _ in items], torch.stack(pictures) if pictures else torch.empty(0), errors


def encode_images(
    model: DiaNAModel,
    paths: Sequence[str],
    transform: Any,
    *,
    batch_size: int,
    num_workers: int = 0,
    attributes: bool = False,
    sim_dtype: str = "fp32",
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
        _Pictures(paths, transform),
        batch_size=batch_size,
        num_workers=usable_workers(num_workers),
        collate_fn=_stacked,
        pin_memory=model.device.type == "cuda",
    )
    with tqdm(total=len(paths), unit="image", disable=not progress) as bar:
        for read, pictures, errors in loader:
            if errors:
                raise errors[0]
            with evaluating(model):
                parts = in_halves(run, pictures)
            embeds = torch.cat([part[0] for part in parts])
            refined = [part[1] for part in parts if part[1] is not None]
            yield read, embeds, torch.cat(refined) if refined else None
            bar.update(len(read))

"""The index file of `diana-index`: features of images, once for all conversations.

A safetensors file: `global` `[N, D]` and, for attributes, `attrs` `[N, K, D]`, float32 and of unit norm; metadata
(strings): `format`, `paths` (a JSON list, in the order of the rows), `image_size` (JSON), `checkpoint`.
"""

import hashlib
import json
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diana.retrieval.scores import Features
from tbps_common.errors import GalleryError
from tbps_common.files import atomic_path

FORMAT = "diana-index/1"
_SHOWN_DIGITS = 12
# Of a weight file: enough to tell two trainings apart, few enough that a chat starts at once.
_SAMPLES, _SAMPLE_BYTES = 1024, 4096
# safetensors refuses headers above 100 MB, the rest of ours included.
_MOST_PATH_BYTES = 99_000_000


@dataclass(frozen=True, eq=False)
class Gallery:
    """An index in memory.

    Attributes:
        paths: N image files.
        embeds: `[N, D]`.
        attributes: `[N, K, D]`, or None.
        image_size: height and width the images were resized to.
        checkpoint: mark of the model (`checkpoint_mark`).
    """

    paths: list[str]
    embeds: Tensor
    attributes: Tensor | None
    image_size: tuple[int, int]
    checkpoint: str

    @property
    def features(self) -> Features:
        """For `diana.retrieval.score_rows_of`."""
        return Features(self.embeds, self.attributes)

    def without(self, paths: Collection[str]) -> "Gallery":
        """The same index without some of its images."""
        kept = [place for place, path in enumerate(self.paths) if path not in paths]
        return replace(
            self,
            paths=[self.paths[place] for place in kept],
            embeds=self.embeds[kept],
            attributes=None if self.attributes is None else self.attributes[kept],
        )


def checkpoint_mark(folder: Path) -> str:
    """SHA-256 of a checkpoint's config.json, and of the sizes and of evenly spread samples of its weight files.

    Two trainings of one configuration leave files of the same size, hence the samples.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                file.seek(start)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def join(
    batches: Iterable[tuple[list[str], Tensor, Tensor | None]], earlier: Gallery | None = None
) -> tuple[list[str], Tensor, Tensor | None]:
    """Paths, features and attributes of all batches, after those of an earlier index.

    Raises:
        GalleryError: there is no image.
    """
    paths: list[str] = []
    embeds, attributes = [], []
    if earlier is not None:
        batches = chain([(earlier.paths, earlier.embeds, earlier.attributes)], batches)
    for batch_paths, batch_embeds, batch_attributes in batches:
        paths += batch_paths
        embeds.append(batch_embeds)
        if batch_attributes is not None:
            attributes.append(batch_attributes)
    if not paths:
        raise GalleryError("not one of the images can be read: give other images")
    return paths, torch.cat(embeds), torch.cat(attributes) if attributes else None


def check_paths_fit(paths: Collection[str]) -> None:
    """Require that the list of images fits the file's header, before hours are spent on their features.

    Raises:
        GalleryError: it does not.
    """
    if len(json.dumps(json.dumps(list(paths)))) > _MOST_PATH_BYTES:
        raise GalleryError(
            f"the paths of {len(paths)} images do not fit the header of one index: index parts of them, each with its own "
            "--out, or move them to a folder with a shorter path"
        )


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Write the file, whole or not at all."""
    tensors = {"global": gallery.embeds.contiguous()}
    if gallery.attributes is not None:
        tensors["attrs"] = gallery.attributes.contiguous()
    metadata = {
        "format": FORMAT,
        "paths": json.dumps(gallery.paths),
        "image_size": json.dumps(list(gallery.image_size)),
        "checkpoint": gallery.checkpoint,
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def read_header(path: Path) -> dict[str, Any]:
    """Metadata of an index, without its features and without torch.

    Raises:
        GalleryError: the file is absent, damaged, or not an index of diana.
    """
    if not path.is_file():
        raise GalleryError(f"index {path} does not exist: create it with diana-index --out {path}")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(path.stat().st_size, 1 << 30):
                raise ValueError("its header has an impossible length")
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format', 'not given')}")
        paths, size = json.loads(metadata["paths"]), json.loads(metadata["image_size"])
        if not all(isinstance(entry, str) for entry in paths) or len(size) != 2:
            raise ValueError("its list of images is damaged")
        return {"paths": paths, "image_size": tuple(size), "checkpoint": metadata["checkpoint"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GalleryError(
            f"{path} is damaged or not an index of diana ({error}): make it again with diana-index"
        ) from error


def require_checkpoint(path: Path, header: dict[str, Any], folder: Path) -> None:
    """Refuse an index that another model made.

    Raises:
        GalleryError: it is of another checkpoint.
    """
    mark = checkpoint_mark(folder)
    if header["checkpoint"] != mark:
        raise GalleryError(
            f"{path} was made with another checkpoint ({header['checkpoint'][:_SHOWN_DIGITS]}) than {folder} "
            f"({mark[:_SHOWN_DIGITS]}): give that one, or make the index again with diana-index"
        )


def read_gallery(path: Path) -> Gallery:
    """Read an index.

    Raises:
        GalleryError: as `read_header`, or the features do not fit the list of images.
    """
    header = read_header(path)
    try:
        tensors = load_file(path)
        embeds, attributes = tensors["global"], tensors.get("attrs")
    except (SafetensorError, OSError, KeyError) as error:
        raise GalleryError(f"{path} is damaged ({error}): make it again with diana-index") from error
    count = len(header["paths"])
    fits = embeds.dim() == 2 and len(embeds) == count and bool(embeds.isfinite().all())
    if not fits or (attributes is not None and (attributes.dim() != 3 or len(attributes) != count)):
        raise GalleryError(f"{path} holds features that do not fit its {count} images: make it again with diana-index")
    return Gallery(header["paths"], embeds, attributes, header["image_size"], header["checkpoint"])

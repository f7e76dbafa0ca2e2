"""The index file of `diana-index`: features of images, once for all conversations.

A safetensors file: `global` `[N, D]` and, for attributes, `attrs` `[N, K, D]`, float32 and of unit norm; metadata
(strings): `format`, `paths` (a JSON list, in the order of the rows), `image_size` (JSON), `checkpoint`.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbps_common.errors import GalleryError

if TYPE_CHECKING:
    from torch import Tensor

    from diana.retrieval.scores import Features

FORMAT = "diana-index/1"
_SHOWN_DIGITS = 12


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
    embeds: "Tensor"
    attributes: "Tensor | None"
    image_size: tuple[int, int]
    checkpoint: str

    @property
    def features(self) -> "Features":
        """For `diana.retrieval.score_rows_of`."""
        from diana.retrieval.scores import Features

        return Features(self.embeds, self.attributes)


def checkpoint_mark(folder: Path) -> str:
    """SHA-256 of a checkpoint's config.json and of the sizes of its weight files."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted((*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin"))):
        digest.update(f"{file.name} {file.stat().st_size}\n".encode())
    return digest.hexdigest()


def join(batches: "Iterable[tuple[list[str], Tensor, Tensor | None]]") -> "tuple[list[str], Tensor, Tensor | None]":
    """Paths, features and attributes of all batches.

    Raises:
        GalleryError: there is no image.
    """
    import torch

    paths: list[str] = []
    embeds, attributes = [], []
    for batch_paths, batch_embeds, batch_attributes in batches:
        paths += batch_paths
        embeds.append(batch_embeds)
        if batch_attributes is not None:
            attributes.append(batch_attributes)
    if not paths:
        raise GalleryError("none of the images can be read: give other images")
    return paths, torch.cat(embeds), torch.cat(attributes) if attributes else None


def write_gallery(path: Path, gallery: Gallery) -> None:
    """Write the file, whole or not at all."""
    from safetensors.torch import save_file

    from tbps_common.files import atomic_path

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
        GalleryError: the file is absent, damaged, or no index of diana.
    """
    if not path.is_file():
        raise GalleryError(f"index {path} does not exist: make it with diana-index --out {path}")
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
            f"{path} is damaged or no index of diana ({error}): make it again with diana-index"
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
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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

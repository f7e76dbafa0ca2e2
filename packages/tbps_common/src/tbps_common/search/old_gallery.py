"""A gallery index: image features, image paths and the model's fingerprint in one memory-mapped safetensors file.

Layout of the file (readable by any safetensors reader):

* tensor `features` `[N, D]`, `[N, T, D]` (token sets) or `[N, K, C]` (attributes), float32 or float16;
* tensor `path_bytes` (uint8): the paths in UTF-8 one after the other, then zeros up to a multiple of 8;
* tensor `path_ends` (int64) `[N]`: where each path ends;
* metadata (strings): `format`, `package`, `fingerprint`, `reduce`, `k`, and `root` if the paths are relative to it.

The features come first, so that a file is written in one pass while the model encodes: the header is reserved, filled
with spaces (as the format allows), and written last. Neither writing nor searching ever holds all features in memory.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tbps_common.errors import GalleryError
from tbps_common.files import atomic_path
from tbps_common.images import SUFFIXES

FORMAT = "tbps-gallery/1"

Batches = Iterable[tuple[list[str], Tensor]]

_DTYPES = {torch.float32: "F32", torch.float16: "F16"}
_SCORE_BYTES = 128 << 20
_SHOWN_DIGITS = 12


def find_images(folder: str | os.PathLike[str]) -> list[str]:
    """Paths of all images under a folder, sorted; hidden files and folders are left out.

    Linked folders are entered, each real folder once, so that a link upwards does not go round in circles.

    Returns:
        `folder` joined with the relative path of each image.

    Raises:
        GalleryError: the folder is absent or cannot be read, or there is no image.
    """
    root = os.fspath(folder)
    if not os.path.isdir(root):
        raise GalleryError(f"Image folder {root} does not exist; give the folder that holds the images.")
    seen: set[str] = set()
    found: list[str] = []
    for current, folders, files in os.walk(root, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(current)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        names = (name for name in files if not name.startswith(".") and name.lower().endswith(SUFFIXES))
        found.extend(path for path in (os.path.join(current, name) for name in names) if os.path.isfile(path))
    if not found:
        raise GalleryError(f"There are no images under {root} (looked for {', '.join(SUFFIXES)}); give another folder.")
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise GalleryError(f"Folder {error.filename} cannot be read ({error.strerror}); check its permissions.") from error


class GalleryIndex:
    """An open index. `features` is a memory map: rows are read from the disk when they are used.

    Attributes:
        path: the file.
        features: `[N, ...]`, float32 or float16.
        paths: N image paths, as they were given when indexing.
        package: which package computed the features.
        fingerprint: of the model that did (`tbps_common.run.checkpoint.fingerprint`).
        reduce: how scores are made from the features (`tbps_common.ranking.score_rows`).
        k: tokens averaged by `reduce="topk_mean"`.
        root: folder that the paths are relative to, if any.
        skipped: images left out by the last `build` or `append` because their path was there already.
    """

    def __init__(self, path: str | os.PathLike[str], features: Tensor, paths: list[str], metadata: "_Metadata") -> None:
        self.path = Path(path)
        self.features = features
        self.paths = paths
        self.package = metadata.package
        self.fingerprint = metadata.fingerprint
        self.reduce = metadata.reduce
        self.k = metadata.k
        self.root = metadata.root
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.paths)

    def image_path(self, position: int) -> str:
        """Where the image at a position of the index lies: its path, under `root` if there is one."""
        return os.path.join(self.root, self.paths[position]) if self.root else self.paths[position]

    @classmethod
    def build(
        cls,
        path: str | os.PathLike[str],
        batches: Batches,
        *,
        fingerprint: str,
        package: str,
        reduce: str = "dot",
        k: int = 6,
        root: str | os.PathLike[str] | None = None,
    ) -> "GalleryIndex":
        """Write a new index, whole or not at all, and open it.

        Args:
            path: file to write; an existing index is replaced when the new one is complete.
            batches: yields the paths and features `[len(paths), ...]` of some images at a time; float16 is kept, other
                floating types become float32. A path met before is left out and counted in `skipped`.
            fingerprint: of the model, so that queries of another one can be refused.
            package: import name of the package that computes the features.
            reduce: how scores are made from the features.
            k: tokens averaged by `reduce="topk_mean"`.
            root: folder that the paths are relative to.

        Raises:
            GalleryError: there is no image, or the features are not finite or differ in shape.
            OSError: the disk is full; nothing is left behind.
        """
        metadata = _Metadata(package, fingerprint, reduce, k, None if root is None else os.fspath(root))
        with atomic_path(path) as temporary, open(temporary, "wb") as stream:
            writer = _Writer(stream, metadata)
            writer.add_all(batches)
            writer.finish()
        index = cls.open(path, fingerprint=fingerprint)
        index.skipped = writer.skipped
        return index

    def append(self, batches: Batches) -> "GalleryIndex":
        """Add images. The file is replaced by the longer one when that is complete; batches and errors as for `build`.

        Returns:
            This index, now with the images added.
        """
        metadata = _Metadata(self.package, self.fingerprint, self.reduce, self.k, self.root)
        with atomic_path(self.path) as temporary, open(temporary, "wb") as stream:
            writer = _Writer(stream, metadata)
            writer.copy(self.path, self)
            writer.add_all(batches)
            writer.finish()
        longer = GalleryIndex.open(self.path, fingerprint=self.fingerprint)
        self.features, self.paths, self.skipped = longer.features, longer.paths, writer.skipped
        return self

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, fingerprint: str | None = None) -> "GalleryIndex":
        """Open an index without reading its features.

        Args:
            path: the file.
            fingerprint: of the model that will encode the queries; `None` does not compare.

        Raises:
            GalleryError: the file is absent, damaged, no gallery index, or made by another model.
        """
        file = Path(path)
        if not file.is_file():
            raise GalleryError(f"Gallery index {file} does not exist; build it with the package's index command.")
        try:
            with safe_open(file, framework="pt") as content:
                metadata = _Metadata.parse(file, content.metadata())
                missing = {"features", "path_bytes", "path_ends"} - set(content.keys())
                if missing:
                    raise GalleryError(f"{file} is missing {sorted(missing)[0]!r}; build the index again.")
                features = content.get_tensor("features")
                paths = _decode_paths(file, content.get_tensor("path_bytes"), content.get_tensor("path_ends"))
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise GalleryError(
                f"{file} is damaged or not a gallery index ({reason}); build the index again."
            ) from error
        if features.dtype not in _DTYPES or features.dim() not in (2, 3) or len(features) != len(paths):
            shape = list(features.shape)
            raise GalleryError(f"{file} holds {len(paths)} paths but features {shape}; build the index again.")
        if fingerprint is not None and fingerprint != metadata.fingerprint:
            raise GalleryError(
                f"{file} was made by model {metadata.fingerprint[:_SHOWN_DIGITS]} of {metadata.package}, the query comes "
                f"from model {fingerprint[:_SHOWN_DIGITS]}; use the checkpoint of the index, or build the index again."
            )
        return cls(file, features, paths, metadata)

    def search(
        self, query_feats: Tensor, topk: int = 10, *, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """Best images for each query; among equal scores the earlier image of the index comes first.

        Args:
            query_feats: `[Q, D]`, or `[Q, K, C]` for attribute features, normalised as the gallery was.
            topk: how many images per query.
            device: where to score; by default where the queries are.

        Returns:
            Positions (int64) and scores, each `[Q, min(topk, N)]` on the CPU, best first.

        Raises:
            ValueError: the query does not fit the features, or either holds NaN or infinity.
        """
        from tbps_common.ranking import best_of_rows, score_rows

        place = query_feats.device if device is None else device
        rows = score_rows(query_feats, self.features, reduce=self.reduce, k=self.k, device=place)
        step = max(1, _SCORE_BYTES // (4 * len(self)))
        found = [
            best_of_rows(rows(start, min(start + step, len(query_feats))), topk)
            for start in range(0, len(query_feats), step)
        ]
        scores, indices = (torch.cat(parts).cpu() for parts in zip(*found))
        if not bool(torch.isfinite(scores).all()):
            raise GalleryError(f"Scores against {self.path} hold NaN or infinity; check the checkpoint of the query.")
        return indices, scores


def complete_index(
    path: str | os.PathLike[str],
    images: Sequence[str],
    encode: Callable[[list[str]], Batches],
    *,
    fingerprint: str,
    package: str,
    reduce: str = "dot",
    k: int = 6,
) -> str:
    """Write an index of the images or, where there is one already, add the images that it lacks.

    Args:
        path: the index file.
        images: paths of all images that it should hold.
        encode: yields paths and features of the images that it is given, batch by batch.
        fingerprint: of the model.
        package: import name of the package that computes the features.
        reduce: how scores are made from the features; an index that exists must have the same.
        k: tokens averaged by `reduce="topk_mean"`; likewise.

    Returns:
        A sentence for the user: how many images were added, and how many there are.

    Raises:
        GalleryError: the existing index is damaged, or was made by another model or with another rule for scores.
        OSError: the disk is full; an existing index stays as it was.
    """
    file = Path(path)
    if not file.exists():
        index = GalleryIndex.build(
            file, encode(list(images)), fingerprint=fingerprint, package=package, reduce=reduce, k=k
        )
        return f"{file}: {len(index)} images"
    index = GalleryIndex.open(file, fingerprint=fingerprint)
    if (index.reduce, index.k) != (reduce, k):
        raise GalleryError(
            f"{file} was made with {index.reduce} scores (k {index.k}), and {reduce} (k {k}) is wanted now; "
            "write to another file, or build the index again."
        )
    known = set(index.paths)
    new = [image for image in images if image not in known]
    if new:
        index.append(encode(new))
    return f"{file}: {len(new)} images added, {len(images) - len(new)} there already, {len(index)} in all"


@dataclass(frozen=True)
class _Metadata:
    package: str
    fingerprint: str
    reduce: str
    k: int
    root: str | None

    def as_strings(self) -> dict[str, str]:
        fields = {"package": self.package, "fingerprint": self.fingerprint, "reduce": self.reduce, "k": str(self.k)}
        return {"format": FORMAT, **fields, **({} if self.root is None else {"root": self.root})}

    @classmethod
    def parse(cls, file: Path, metadata: dict[str, str] | None) -> "_Metadata":
        entries = metadata or {}
        if entries.get("format") != FORMAT:
            found = entries.get("format", "nothing")
            raise GalleryError(f"{file} is not a gallery index of format {FORMAT} (found: {found}); build it again.")
        try:
            return cls(
                entries["package"], entries["fingerprint"], entries["reduce"], int(entries["k"]), entries.get("root")
            )
        except (KeyError, ValueError) as error:
            raise GalleryError(f"{file} has an incomplete header ({error}); build the index again.") from error


def _decode_paths(file: Path, path_bytes: Tensor, path_ends: Tensor) -> list[str]:
    content, ends = path_bytes.numpy(), path_ends.numpy()
    ordered = ends.ndim == content.ndim == 1 and content.dtype == np.uint8 and ends.dtype == np.int64
    if not (ordered and len(ends) > 0 and ends[0] >= 0 and (np.diff(ends) >= 0).all() and ends[-1] <= len(content)):
        raise GalleryError(f"{file} has a damaged list of paths; build the index again.")
    whole, bounds = content.tobytes(), [0, *ends.tolist()]
    try:
        return [whole[a:b].decode("utf-8", "surrogateescape") for a, b in zip(bounds, bounds[1:])]
    except UnicodeDecodeError as error:
        raise GalleryError(f"{file} has a damaged list of paths; build the index again.") from error


@dataclass
class _Writer:
    """Streams features to a file whose header is filled in at the end."""

    stream: BinaryIO
    metadata: _Metadata
    skipped: int = 0
    _shape: tuple[int, ...] | None = None
    _dtype: torch.dtype = torch.float32
    _paths: dict[str, None] = field(default_factory=dict)
    _reserved: int = 0

    def copy(self, path: Path, index: GalleryIndex) -> None:
        """Take over the features of an existing file byte by byte."""
        self._begin(tuple(index.features.shape[1:]), index.features.dtype)
        self._paths = dict.fromkeys(index.paths)
        left = index.features.numel() * index.features.element_size()
        with open(path, "rb") as source:
            offset = _offset_of_features(path, source)
            source.seek(offset)
            while left:
                block = source.read(min(left, 1 << 22))
                if not block:
                    raise GalleryError(f"{path} was cut off while it was copied; build the index again.")
                self.stream.write(block)
                left -= len(block)

    def add_all(self, batches: Batches) -> None:
        for paths, features in batches:
            self._add(paths, features)
        if not self._paths:
            raise GalleryError("A gallery index needs at least one image; give a folder that holds some.")

    def _add(self, paths: list[str], features: Tensor) -> None:
        if len(paths) != len(features):
            raise GalleryError(f"{len(paths)} paths came with {len(features)} features; each image needs one.")
        if features.dim() not in (2, 3) or not features.is_floating_point():
            raise GalleryError(f"Features must be floating [N, D] or [N, T, D], not {features.dtype} {features.shape}.")
        fresh: list[int] = []
        for position, path in enumerate(paths):
            if path not in self._paths:
                self._paths[path] = None
                fresh.append(position)
        self.skipped += len(paths) - len(fresh)
        if not fresh:
            return
        if self._shape is None:
            self._begin(tuple(features.shape[1:]), torch.float16 if features.dtype == torch.float16 else torch.float32)
        if tuple(features.shape[1:]) != self._shape:
            raise GalleryError(
                f"Features of {paths[fresh[0]]} have shape {list(features.shape[1:])}, those of the index "
                f"{list(self._shape or ())}; use the model the index was built with."
            )
        kept = features.detach() if len(fresh) == len(paths) else features.detach()[fresh]
        kept = kept.to("cpu", self._dtype).contiguous()
        finite = torch.isfinite(kept).flatten(1).all(dim=1)
        if not bool(finite.all()):
            first = paths[fresh[int((~finite).nonzero()[0])]]
            raise GalleryError(f"Features of {first} hold NaN or infinity; check the image and the checkpoint.")
        self.stream.write(kept.numpy().data)

    def _begin(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._shape, self._dtype = shape, dtype
        # The longest numbers a header can hold decide how much room it gets.
        self._reserved = len(self._header(10**15, 10**18))
        self.stream.write(b" " * (8 + self._reserved))

    def finish(self) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in self._paths]
        ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        blob = b"".join(encoded)
        features_size = self._features_size(len(encoded))
        blob += b"\0" * (-(features_size + len(blob)) % 8)  # path_ends starts at a multiple of its item size
        self.stream.write(blob)
        self.stream.write(ends.astype("<i8").data)
        header = self._header(len(encoded), len(blob))
        self.stream.seek(0)
        self.stream.write(struct.pack("<Q", self._reserved) + header.ljust(self._reserved))
        self.stream.flush()

    def _features_size(self, count: int) -> int:
        return count * int(np.prod(self._shape or (), dtype=np.int64)) * self._dtype.itemsize

    def _header(self, count: int, path_size: int) -> bytes:
        first, second = self._features_size(count), self._features_size(count) + path_size
        header = {
            "__metadata__": self.metadata.as_strings(),
            "features": _entry(_DTYPES[self._dtype], [count, *(self._shape or ())], 0, first),
            "path_bytes": _entry("U8", [path_size], first, second),
            "path_ends": _entry("I64", [count], second, second + 8 * count),
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        return text.ljust(-(-len(text) // 8) * 8)


def _entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _offset_of_features(path: Path, source: BinaryIO) -> int:
    (length,) = struct.unpack("<Q", source.read(8))
    return 8 + length + json.loads(source.read(length))["features"]["data_offsets"][0]

"""Features of galleries and queries: images in, the vectors that are compared out.

The outputs of a frozen ViT on the test images never change while the rest is trained. `StateCache` keeps as many of
them as its limit allows, so that a validation during training loads and encodes only the others.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from fafa.model.blip2 import Blip2FAFACPR
from tbps_common.run.distributed import Ranks, gather_objects


class ExtractionStopped(Exception):
    """The run was asked to stop before all features were computed."""


@dataclass
class CacheBudget:
    """Bytes that several caches share.

    Attributes:
        left: bytes not yet taken.
        folder: keep the states in files of this folder instead of in memory.
    """

    left: int
    folder: Path | None = None


@dataclass
class StateCache:
    """Outputs of a frozen ViT on the first images of a data set, `[filled, N, W]`, as exact as the ViT gave them."""

    budget: CacheBudget
    name: str = "states"
    states: Tensor | None = None
    filled: int = 0
    _file: Path | None = field(default=None, repr=False)

    def add(self, states: Tensor, images_in_all: int) -> None:
        """Keep the states of the next images; those beyond the limit are dropped.

        Args:
            states: `[B, N, W]` of one batch; the cache holds whole batches of the first batch's size.
            images_in_all: images of the data set, for which room is reserved.
        """
        if self.states is None:
            self._reserve(states, images_in_all)
        assert self.states is not None
        count = len(states)
        if self.filled + count <= len(self.states):
            self.states[self.filled : self.filled + count] = states.detach().to("cpu")
            self.filled += count

    def _reserve(self, states: Tensor, images_in_all: int) -> None:
        image_bytes = states[0].numel() * states.element_size()
        batch = len(states)
        capacity = images_in_all
        if capacity * image_bytes > self.budget.left:
            capacity = self.budget.left // (image_bytes * batch) * batch
        self.budget.left -= capacity * image_bytes
        shape = (capacity, *states.shape[1:])
        if self.budget.folder is None or capacity == 0:
            self.states = torch.empty(shape, dtype=states.dtype)
            return
        self.budget.folder.mkdir(parents=True, exist_ok=True)
        self._file = self.budget.folder / f".fafa_{self.name}_{os.getpid()}.cache"
        elements = capacity * states[0].numel()
        self.states = torch.from_file(str(self._file), shared=True, size=elements, dtype=states.dtype).view(shape)
        if os.name != "nt":  # a mapped file needs no name, and one without leaves nothing behind when a run is killed
            self._file.unlink()
            self._file = None

    def close(self) -> None:
        """Give the memory or the file back."""
        self.states = None
        self.filled = 0
        if self._file is not None:
            self._file.unlink(missing_ok=True)
            self._file = None


@dataclass(frozen=True)
class Extractor:
    """How features are computed: the model, the loading, and what to leave to other processes.

    Attributes:
        model: in evaluation mode while features are computed.
        device: where images go.
        clean: the caption processor.
        batch_size: images encoded at once.
        num_workers: processes that load images.
        ranks: each process computes a slice of every data set, and all get all features.
        stop_requested: asked between batches.
        progress: show a bar.
    """

    model: Blip2FAFACPR
    device: torch.device
    clean: Callable[[str], str] = str
    batch_size: int = 64
    num_workers: int = 2
    ranks: Ranks = Ranks()
    stop_requested: Callable[[], bool] = bool
    progress: bool = False

    def gallery(self, dataset: Any, cache: StateCache | None = None) -> Tensor:
        """Features `[G, T, D]` (float32, CPU) of a data set of items `(id, image)`, in its order.

        Raises:
            ExtractionStopped: the run was asked to stop.
            DatasetError: an image cannot be read.
        """
        return self._gathered(dataset, cache, lambda states, first: self.model.target_features(states), "gallery")

    def queries(self, dataset: Any, captions: Sequence[str], cache: StateCache | None = None) -> Tensor:
        """Features `[Q, D]` of reference images `(id, image, ...)` with relative captions; otherwise as `gallery`."""

        def encode(states: Tensor, first: int) -> Tensor:
            cleaned = [self.clean(caption) for caption in captions[first : first + len(states)]]
            return self.model.query_features(states, cleaned)

        return self._gathered(dataset, cache, encode, "queries")

    def gallery_batches(self, dataset: Any) -> Iterator[tuple[int, Tensor]]:
        """As `gallery`, one batch after the other with its place: for galleries whose features should not be held.

        The model must be in evaluation mode, and nothing is shared with other processes.
        """
        for first, states in self._states(dataset, 0, len(dataset), None, "images"):
            yield first, self.model.target_features(states.to(self.device)).cpu()

    def _gathered(
        self, dataset: Any, cache: StateCache | None, encode: Callable[[Tensor, int], Tensor], what: str
    ) -> Tensor:
        start, stop = _slice_of(len(dataset), self.ranks)
        was_training = self.model.training
        self.model.eval()
        try:
            parts = [
                encode(states.to(self.device), start + first)
                for first, states in self._states(dataset, start, stop, cache, what)
            ]
        finally:
            self.model.train(was_training)
        own = torch.cat(parts) if parts else None
        if not self.ranks.distributed:
            assert own is not None, "a data set of no images"
            return own.cpu()
        return _all_slices(own, len(dataset), self.ranks, self.device)

    def _states(
        self, dataset: Any, start: int, stop: int, cache: StateCache | None, what: str
    ) -> Iterator[tuple[int, Tensor]]:
        """Place (from `start` on) and ViT outputs of one batch after the other."""
        from tqdm import tqdm

        cached = cache.filled if cache is not None else 0
        batches = -(-(stop - start) // self.batch_size)
        disable = None if self.progress and self.ranks.is_main else True
        with tqdm(total=batches, desc=what, unit="batch", leave=False, disable=disable) as bar:
            for first in range(0, cached, self.batch_size):
                assert cache is not None and cache.states is not None
                self._check_stop()
                yield first, cache.states[first : min(first + self.batch_size, cached)]
                bar.update()
            if start + cached == stop:
                return
            first = cached
            for images in _images(dataset, range(start + cached, stop), self.batch_size, self.num_workers, self.device):
                self._check_stop()
                states = self.model.evaluation_states(images.to(self.device, non_blocking=True))
                if cache is not None:
                    cache.add(states, stop - start)
                yield first, states
                first += len(states)
                bar.update()

    def _check_stop(self) -> None:
        # Processes that wait for each other's slices cannot stop one by one.
        if not self.ranks.distributed and self.stop_requested():
            raise ExtractionStopped


class _OnlyImages(Dataset[Tensor]):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return self.dataset[index][1]


def _images(dataset: Any, places: range, batch_size: int, num_workers: int, device: torch.device) -> Iterator[Tensor]:
    loader: DataLoader[Tensor] = DataLoader(
        Subset(_OnlyImages(dataset), places),
        batch_size=batch_size,
        num_workers=usable_workers(num_workers),
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # or making the iterator would draw from the generator that training uses
    )
    yield from loader


def usable_workers(requested: int) -> int:
    """At most one loading process per processor: more only get in each other's way, and torch warns of them."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(requested, len(affinity(0)) if affinity else os.cpu_count() or 1)


def _slice_of(count: int, ranks: Ranks) -> tuple[int, int]:
    """The part of `count` items that a process computes; the parts follow each other in rank order."""
    share = -(-count // ranks.world_size)
    return min(ranks.rank * share, count), min((ranks.rank + 1) * share, count)


def _all_slices(own: Tensor | None, count: int, ranks: Ranks, device: torch.device) -> Tensor:
    """Join the features of all processes. Only the last ones can have fewer, or none."""
    shapes = gather_objects(None if own is None else tuple(own.shape[1:]))
    shape = next(shape for shape in shapes if shape is not None)
    padded = torch.zeros((-(-count // ranks.world_size), *shape), device=device)
    if own is not None:
        padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(ranks.world_size)]
    dist.all_gather(parts, padded)
    return torch.cat(parts)[:count].cpu()

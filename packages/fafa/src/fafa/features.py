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
from torch.utils.data import DataLoader, Dataset

from fafa.model.blip2 import Blip2
from tbps_common.run.batches import usable_workers
from tbps_common.run.distributed import Ranks
from tbps_common.run.progress import progress_bar


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

    All features stay where the model is, so that they are ranked there.

    Attributes:
        model: in evaluation mode while features are computed.
        clean: the caption processor.
        batch_size: images encoded at once.
        num_workers: processes that load images.
        ranks: the processes that share a data set. Each loads and encodes one part of it; the parts are cut between
            batches, so that features do not depend on the number of processes.
        stop_requested: asked between batches.
        progress: show a bar.
    """

    model: Blip2
    clean: Callable[[str], str] = str
    batch_size: int = 64
    num_workers: int = 2
    ranks: Ranks = Ranks()
    stop_requested: Callable[[], bool] = bool
    progress: bool = False

    def own_part(self, count: int) -> slice:
        """The part of `count` items that this process encodes; the parts follow each other in rank order."""
        batches = -(-count // self.batch_size)
        share = -(-batches // self.ranks.world_size) * self.batch_size
        return slice(min(self.ranks.rank * share, count), min((self.ranks.rank + 1) * share, count))

    def gallery(self, dataset: Any, cache: StateCache | None = None) -> Tensor:
        """Features of this process's part of a data set of items `(id, image)`: `[own, T, D]`, float32, in its order.

        Raises:
            ExtractionStopped: the run was asked to stop.
            DatasetError: an image cannot be read.
        """
        settings = self.model.settings
        features = self._encoded(dataset, cache, lambda states, first: self.model.target_features(states), "gallery")
        return torch.cat(
            [torch.empty(0, settings.num_query_token, settings.embed_dim, device=self.model.device), *features]
        )

    def queries(self, dataset: Any, captions: Sequence[str], cache: StateCache | None = None) -> Tensor:
        """Features of all reference images `(id, image, ...)` with relative captions, `[Q, D]`, on every process.

        Raises: as `gallery`.
        """

        def encode(states: Tensor, first: int) -> Tensor:
            cleaned = [self.clean(caption) for caption in captions[first : first + len(states)]]
            return self.model.query_features(states, cleaned)

        features = self._encoded(dataset, cache, encode, "queries")
        every = torch.zeros(len(dataset), self.model.settings.embed_dim, device=self.model.device)
        if features:
            every[self.own_part(len(dataset))] = torch.cat(features)
        if self.ranks.distributed:
            dist.all_reduce(every)  # zero where another process has the numbers
        return every

    def _encoded(
        self, dataset: Any, cache: StateCache | None, encode: Callable[[Tensor, int], Tensor], what: str
    ) -> list[Tensor]:
        """Features of the own part, batch by batch; `encode` takes ViT outputs and the place of the first one."""
        own = self.own_part(len(dataset))
        was_training = self.model.training
        self.model.eval()
        try:
            return [encode(states, own.start + first) for first, states in self._states(dataset, own, cache, what)]
        finally:
            self.model.train(was_training)

    def _states(self, dataset: Any, part: slice, cache: StateCache | None, what: str) -> Iterator[tuple[int, Tensor]]:
        """Place (within the part) and ViT outputs of one batch after the other."""
        count, device = part.stop - part.start, self.model.device
        cached = cache.filled if cache is not None else 0
        batches, shown = -(-count // self.batch_size), self.progress and self.ranks.is_main
        with progress_bar(batches, unit="batch", desc=what, enabled=shown) as bar:
            bar.leave = False
            for first in range(0, cached, self.batch_size):
                assert cache is not None and cache.states is not None
                self._check_stop()
                yield first, cache.states[first : min(first + self.batch_size, cached)].to(device)
                bar.update()
            if cached == count:
                return
            loader: DataLoader[Tensor] = DataLoader(
                _Images(dataset, range(part.start + cached, part.stop)),
                batch_size=self.batch_size,
                num_workers=usable_workers(self.num_workers),
                pin_memory=device.type == "cuda",
                generator=torch.Generator(),  # or making the iterator would draw from the generator that training uses
            )
            first = cached
            for images in loader:
                self._check_stop()
                states = self.model.evaluation_states(images.to(device, non_blocking=True))
                if cache is not None:
                    cache.add(states, count)
                yield first, states
                first += len(states)
                bar.update()

    def _check_stop(self) -> None:
        # Processes that wait for each other's parts cannot stop one by one.
        if not self.ranks.distributed and self.stop_requested():
            raise ExtractionStopped


class _Images(Dataset[Tensor]):
    """The images alone of some places of a data set."""

    def __init__(self, dataset: Any, places: range):
        self.dataset, self.places = dataset, places

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Tensor:
        return self.dataset[self.places[index]][1]

"""What a model must offer so that its pictures can be indexed and searched, and how one is opened by its name.

A name is `KIND:PLACE`, such as `cmlfa:logs/CUHK-PEDES/RUN` or `clip:ViT-B-16/openai`. Packages register, in the entry-point
group `tbps.retrievers`, a function `open(place, *, device, trust) -> Retriever` under their KIND.
"""

import difflib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import entry_points

import torch
from PIL import Image
from torch import Tensor

from tbps_common.errors import DatasetError, InputError
from tbps_common.images import read_image
from tbps_common.ranking.memory import is_out_of_memory, release_cached_memory
from tbps_common.run.batches import usable_workers

GROUP = "tbps.retrievers"

Features = dict[str, Tensor]
"""By name, `[N, ...]` each, on the CPU."""

Round = list[dict[str, str]]
"""A question and its answer: `[{"from": "gpt", "value": ...}, {"from": "user", "value": ...}]`."""

KINDS = {
    "text": "a sentence",
    "image": "a picture",
    "image+text": "a picture and a sentence that says what is different",
    "dialogue": "a dialogue",
}


@dataclass(frozen=True)
class Query:
    """What is asked for: a sentence, a picture, both, or a dialogue.

    Attributes:
        text: the person, or with a picture what is different.
        image: RGB.
        dialogue: rounds of question and answer.
    """

    text: str = ""
    image: Image.Image | None = None
    dialogue: tuple[Round, ...] = ()

    @property
    def kind(self) -> str:
        """One of `KINDS`."""
        if self.dialogue:
            return "dialogue"
        if self.image is not None:
            return "image+text" if self.text.strip() else "image"
        return "text"


@dataclass(frozen=True)
class Feature:
    """One kind of features of a picture.

    Attributes:
        name: of it; lower-case letters.
        shape: of one picture: `[D]`, `[T, D]` (token sets) or `[K, C]` (attributes).
        reduce: how scores are made from it (`tbps_common.ranking.score_rows`).
        k: tokens averaged by `reduce="topk_mean"`.
    """

    name: str
    shape: tuple[int, ...]
    reduce: str = "dot"
    k: int = 6


@dataclass(frozen=True)
class Retriever:
    """A model that is ready to encode. The score of a picture is the sum of the scores of all features.

    Attributes:
        name: `KIND:PLACE`, as the user gave it.
        queries: those of `KINDS` that it takes.
        fingerprint: of the weights and of the settings that decide features (`tbps_common.run.checkpoint.fingerprint`).
        features: what `encode_images` and `encode_queries` give.
        device: where it computes.
        transform: picture (RGB) -> tensor. It is called in several threads.
        encode_images: `[B, ...]` pictures on the device -> features `[B, *shape]`, normalised.
        encode_queries: Q queries of one kind -> features `[Q, ...]` that fit those of pictures.
        batch_size: pictures encoded at once, if nothing else is asked for.
        note: what the user should know about these features.
        judge: `(query, pictures, scores [N], lowest) -> scores [N]`: a slower and better judgement of the first pictures
            of one query. `scores` of N hits, best first, of which `pictures` are the first ones; `lowest` is the lowest
            score of the whole gallery.
        ask: `(rounds, features of the most likely pictures) -> the next question`, or None if nothing is left to ask.
    """

    name: str
    queries: tuple[str, ...]
    fingerprint: str
    features: tuple[Feature, ...]
    device: torch.device
    transform: Callable[[Image.Image], Tensor]
    encode_images: Callable[[Tensor], Features]
    encode_queries: Callable[[Sequence[Query]], Features]
    batch_size: int = 64
    note: str = ""
    judge: Callable[[Query, Sequence[Image.Image], Tensor, float], Tensor] | None = None
    ask: Callable[[Sequence[Round], Features], str | None] | None = None


def open_retriever(name: str, *, device: str = "auto", trust: bool = False) -> Retriever:
    """Open a model by its name.

    Args:
        name: `KIND:PLACE`.
        device: of `--device`: auto, cpu, cuda, cuda:N.
        trust: read a checkpoint that could run code.

    Raises:
        InputError: no such kind, its package cannot be imported, or its checkpoint cannot be used.
    """
    kinds = {entry.name: entry for entry in entry_points(group=GROUP)}
    kind, colon, place = name.partition(":")
    known = ", ".join(sorted(kinds)) or "none"
    if not (colon and kind and place):
        raise InputError(
            f"--model {name!r} is not of the form KIND:PLACE, such as clip:ViT-B-16/openai (kinds: {known})"
        )
    if kind not in kinds:
        close = difflib.get_close_matches(kind, kinds, n=1)
        meant = f"did you mean {close[0]}:{place}?" if close else f"install the package that offers it, or use {known}"
        raise InputError(f"--model {name}: no installed package offers {kind!r}: {meant}")
    try:
        opener = kinds[kind].load()
    except ImportError as error:
        raise InputError(f"--model {name}: {kind} cannot be imported ({error}): install its package again") from error
    return opener(place, device=device, trust=trust)


def encode_queries(retriever: Retriever, queries: Sequence[Query]) -> Features:
    """Features of queries of one kind.

    Raises:
        InputError: the model does not take this kind.
    """
    for kind in sorted({query.kind for query in queries}):
        if kind not in retriever.queries:
            takes = " or ".join(KINDS[one] for one in retriever.queries)
            raise InputError(f"{retriever.name} cannot search with {KINDS[kind]}: it takes {takes}")
    with torch.inference_mode():
        return _on_cpu(retriever.encode_queries(queries))


def encode_images(
    retriever: Retriever,
    pictures: Sequence[str | Image.Image],
    *,
    batch_size: int | None = None,
    num_workers: int = 0,
) -> Iterator[tuple[list[int], Features, list[tuple[int, str]]]]:
    """Encode pictures in the order given, as a viewer shows them; a batch that does not fit memory is encoded in halves.

    Args:
        retriever: the model.
        pictures: paths, or pictures in memory.
        batch_size: pictures at a time.
        num_workers: threads that read pictures.

    Yields:
        Of one batch: positions of the pictures encoded, their features, and position and cause of those unreadable.
    """
    size = batch_size or retriever.batch_size

    def load(place: int) -> Tensor | str:
        picture = pictures[place]
        try:
            image = picture if isinstance(picture, Image.Image) else read_image(picture, as_shown=True)
        except DatasetError as error:
            return str(error)
        return retriever.transform(image)

    # Threads rather than processes: decoding and resizing run beside each other in them, and the database's own threads
    # would not survive a fork.
    with ThreadPoolExecutor(max(1, usable_workers(num_workers))) as pool:
        waiting = deque[list[Future[Tensor | str]]]()
        for start in range(0, len(pictures), size):
            waiting.append([pool.submit(load, place) for place in range(start, min(start + size, len(pictures)))])
            if len(waiting) == 3:
                yield _encoded(retriever, start - 2 * size, waiting.popleft())
        left = len(waiting)
        batches = -(-len(pictures) // size)
        for number in range(left):
            yield _encoded(retriever, (batches - left + number) * size, waiting.popleft())


def _encoded(
    retriever: Retriever, start: int, loaded: "list[Future[Tensor | str]]"
) -> tuple[list[int], Features, list[tuple[int, str]]]:
    items = [(start + place, future.result()) for place, future in enumerate(loaded)]
    good = [(place, picture) for place, picture in items if isinstance(picture, Tensor)]
    bad = [(place, picture) for place, picture in items if isinstance(picture, str)]
    features: Features = {}
    if good:
        with torch.inference_mode():
            features = _in_halves(retriever, torch.stack([picture for _, picture in good]))
    return [place for place, _ in good], features, bad


def _in_halves(retriever: Retriever, batch: Tensor) -> Features:
    try:
        return _on_cpu(retriever.encode_images(batch.to(retriever.device)))
    except Exception as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
    # Outside the handler: the exception would keep the tensors of the failed batch alive.
    release_cached_memory()
    parts = [_in_halves(retriever, half) for half in batch.split(-(-len(batch) // 2))]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _on_cpu(features: Features) -> Features:
    return {name: tensor.detach().cpu() for name, tensor in features.items()}

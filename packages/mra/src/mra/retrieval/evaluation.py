"""Evaluation of a split: similarities, re-ranking by matching, metrics of both, on one process or shared by many.

The split is cut into the same batches of captions and images whatever the number of processes. Each process encodes its
share of the batches, and judges the pairs of its own images; so the results are the same, to the last bit, and no
process holds the image tokens of another.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import normalize

from mra.retrieval.metrics import rank_rows
from mra.retrieval.rerank import SIMILARITY_WEIGHT, Matcher, Pairs
from tbps_common.ranking import RetrievalResult, best_of_rows, rerank_rows, score_rows
from tbps_common.run.distributed import Ranks, broadcast_object

if TYPE_CHECKING:
    from mra.model import Retrieval

# Share of the free memory of a GPU that image tokens may take; beyond it they wait in host memory.
_MEMORY_SHARE = 0.4
_CMC_RANKS = 50


class EvaluationStopped(Exception):
    """The run was asked to stop while it evaluated."""


@dataclass(frozen=True)
class SplitEvaluation:
    """What an evaluation found.

    Attributes:
        itc: ranking by the similarities alone.
        itm: ranking after the matching stage: the paper's numbers.
        queries: number of captions.
        gallery: number of images.
        seconds: wall time.
        settings: what of the configuration decides the numbers.
    """

    itc: RetrievalResult
    itm: RetrievalResult
    queries: int
    gallery: int
    seconds: float
    settings: dict[str, Any]


@torch.no_grad()
def evaluate_split(
    model: "Retrieval",
    dataset: Any,
    tokenizer: Any,
    config: Mapping[str, Any],
    *,
    device: torch.device,
    ranks: Ranks | None = None,
    score_world: int = 1,
    num_workers: int = 4,
    amp: bool = False,
    stop: Callable[[], bool] | None = None,
    progress: bool = False,
) -> SplitEvaluation:
    """Evaluate text-to-image retrieval (spec section 8). Every process of the group calls it.

    Args:
        model: the network on `device`; its mode is left as it was.
        dataset: the split (`mra.RetrievalTestDataset`).
        tokenizer: of `mra.build_tokenizer`.
        config: `batch_size_test`, `batch_size_test_text`, `k_test`, `max_tokens`, `test_hflip`.
        device: where to compute.
        ranks: this process among those that share the work; by default it is the only one.
        score_world: number of processes whose released combination of scores is wanted, however many run.
        num_workers: processes that load images.
        amp: compute in bfloat16 autocast (faster; scores differ in the third decimal).
        stop: asked between batches, equally often on every process; must give the same answer on all of them.
        progress: show bars on stderr where it is a terminal.

    Returns:
        The metrics, the same on every process.

    Raises:
        EvaluationStopped: `stop` said yes.
        DatasetError: an image cannot be read.
        ValueError: no caption has an image of its person, or a score is not finite.
    """
    started = time.perf_counter()
    work = _Work(ranks or Ranks(), device, amp, stop, progress)
    was_training = model.training
    model.eval()
    try:
        texts = _encode_captions(model, dataset.text, tokenizer, config, work)
        gallery = _encode_gallery(model, dataset, config, num_workers, work)
        rows = score_rows(texts.features, gallery.features, device=device)
        candidates = _candidates(rows, len(texts.features), min(int(config["k_test"]), len(dataset)), work)
        logits = _judge(model, texts, gallery, candidates, work)
    finally:
        model.train(was_training)
    results = None
    if work.ranks.is_main:
        ranking: dict[str, Any] = {"topk": 10, "max_rank": max(10, min(_CMC_RANKS, len(dataset)))}
        final = rerank_rows(
            rows,
            len(dataset),
            candidates.to(device),
            logits[0],
            itm_flip=logits[1] if len(logits) > 1 else None,
            weight=SIMILARITY_WEIGHT,
            legacy_world_size=score_world,
        )
        results = tuple(rank_rows(scores, dataset.g_pids, dataset.q_pids, **ranking) for scores in (rows, final))
    itc, itm = broadcast_object(results) or (None, None)
    assert itc is not None and itm is not None
    return SplitEvaluation(
        itc=itc,
        itm=itm,
        queries=len(dataset.text),
        gallery=len(dataset),
        seconds=time.perf_counter() - started,
        settings={
            "k_test": int(config["k_test"]),
            "test_hflip": bool(config.get("test_hflip", False)),
            "score_world": score_world,
            "max_tokens": int(config["max_tokens"]),
            "batch_size_test": int(config["batch_size_test"]),
            "batch_size_test_text": int(config["batch_size_test_text"]),
            "precision": "bf16" if amp else "fp32",
        },
    )


@dataclass(frozen=True)
class _Work:
    """How the batches of a split are shared and computed."""

    ranks: Ranks
    device: torch.device
    amp: bool
    stop: Callable[[], bool] | None
    progress: bool

    def own(self, batches: int) -> list[int]:
        """Numbers of this process's batches."""
        return list(range(self.ranks.rank, batches, self.ranks.world_size))

    def rounds(self, batches: int, label: str) -> Any:
        """As many rounds as the process with most batches has; `stop` is asked before each."""
        from tqdm import tqdm

        count = -(-batches // self.ranks.world_size)
        hidden = not (self.progress and self.ranks.is_main)
        for number in tqdm(range(count), desc=label, unit="batch", leave=False, disable=True if hidden else None):
            if self.stop is not None and self.stop():
                raise EvaluationStopped
            yield number

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp)

    def join(self, own: list[Tensor], rows: int, batch_size: int) -> Tensor:
        """The rows of all processes in order, from this process's batches of `batch_size` rows."""
        if not self.ranks.distributed:
            return torch.cat(own)
        order = torch.arange(rows).split(batch_size)
        world = self.ranks.world_size
        places = [torch.cat([*order[rank::world], order[0][:0]]) for rank in range(world)]
        longest = max(len(place) for place in places)
        # A process without a batch of its own learns the shape of a row from the first process, which always has one.
        shape, dtype = broadcast_object((tuple(own[0].shape[1:]), own[0].dtype) if own else None) or ((), None)
        padded = torch.zeros((longest, *shape), dtype=dtype, device=self.device)
        if own:
            joined = torch.cat(own).to(self.device)
            padded[: len(joined)] = joined
        parts = [torch.empty_like(padded) for _ in places]
        dist.all_gather(parts, padded)
        result = padded.new_empty((rows, *shape))
        for place, part in zip(places, parts):
            result[place.to(self.device)] = part[: len(place)]
        return result


@dataclass(frozen=True)
class _Texts:
    """All captions: token embeddings cut to the longest one, mask, unit-norm features."""

    embeds: Tensor
    atts: Tensor
    features: Tensor


@dataclass(frozen=True)
class _Gallery:
    """Features of all images `[G, D]`, and the tokens of this process's batches (plain, and mirrored if asked for)."""

    features: Tensor
    batch_size: int
    tokens: list[list[Tensor]]


def _encode_captions(
    model: "Retrieval", captions: list[str], tokenizer: Any, config: Mapping[str, Any], work: _Work
) -> _Texts:
    from mra.text import tokenize

    batch_size = int(config["batch_size_test_text"])
    ids, atts = tokenize(tokenizer, captions, int(config["max_tokens"]))
    longest = int((torch.arange(1, atts.shape[1] + 1) * atts).max())
    batches = list(zip(ids.split(batch_size), atts.split(batch_size)))
    own = work.own(len(batches))
    embeds, features = [], []
    for number in work.rounds(len(batches), "captions"):
        if number >= len(own):
            continue
        ids_part, atts_part = (part.to(work.device) for part in batches[own[number]])
        with work.autocast():
            encoded = model.get_text_embeds(ids_part, atts_part)
            features.append(normalize(model.get_text_feat(encoded).float(), dim=-1))
        # The padding is part of the feature, but nothing looks at it afterwards.
        embeds.append(encoded[:, :longest].float())
    return _Texts(
        embeds=work.join(embeds, len(captions), batch_size),
        atts=atts[:, :longest],
        features=work.join(features, len(captions), batch_size),
    )


def _encode_gallery(
    model: "Retrieval", dataset: Any, config: Mapping[str, Any], num_workers: int, work: _Work
) -> _Gallery:
    batch_size, mirrored = int(config["batch_size_test"]), bool(config.get("test_hflip", False))
    batches = [part.tolist() for part in torch.arange(len(dataset)).split(batch_size)]
    own = work.own(len(batches))
    loader = iter(
        torch.utils.data.DataLoader(
            dataset,
            batch_sampler=[batches[number] for number in own],
            num_workers=num_workers if own else 0,
            pin_memory=work.device.type == "cuda",
        )
    )
    settings = model.settings.vision
    per_image = 4 * (1 + settings.num_tokens) * settings.feature_width * (2 if mirrored else 1)
    store = _store(work.device, per_image * batch_size * len(own))
    tokens: list[list[Tensor]] = [[] for _ in range(2 if mirrored else 1)]
    features = []
    for number in work.rounds(len(batches), "images"):
        if number >= len(own):
            continue
        image, mirror, _ = next(loader)
        views = []
        for kept, view in zip(tokens, (image, mirror)):
            with work.autocast():
                embeds = model.get_vision_embeds(view.to(work.device, non_blocking=True))[0]
                views.append(normalize(model.get_image_feat(embeds).float(), dim=-1))
            kept.append(embeds.float().to(store))
        features.append((views[0] + views[1]) / 2 if mirrored else views[0])
    return _Gallery(work.join(features, len(dataset), batch_size), batch_size, tokens)


def _store(device: torch.device, size: int) -> torch.device:
    if device.type != "cuda":
        return device
    return device if size < _MEMORY_SHARE * torch.cuda.mem_get_info(device)[0] else torch.device("cpu")


def _candidates(rows: Any, queries: int, k: int, work: _Work) -> Tensor:
    """The `k` most similar images of each caption `[Q, k]`, on the CPU; those of the first process, everywhere."""
    found = None
    if work.ranks.is_main:
        step = max(1, (1 << 25) // rows.num_gallery)
        blocks = [best_of_rows(rows(start, min(start + step, queries)), k)[1] for start in range(0, queries, step)]
        found = torch.cat(blocks).cpu()
    if not work.ranks.distributed and found is not None:
        return found
    shared = torch.empty((queries, k), dtype=torch.int64) if found is None else found
    shared = shared.to(work.device)
    dist.broadcast(shared, src=0)
    return shared.cpu()


def _judge(model: "Retrieval", texts: _Texts, gallery: _Gallery, candidates: Tensor, work: _Work) -> list[Tensor]:
    """Matching logits `[Q, k]` of plain (and mirrored) images, complete on every process."""
    size, count = gallery.batch_size, len(gallery.features)
    batches = -(-count // size)
    own = work.own(batches)
    pairs = Pairs(candidates)
    logits = [torch.zeros(candidates.numel(), device=work.device) for _ in gallery.tokens]
    with work.autocast():
        matcher = Matcher(model, texts.embeds, texts.atts)
    for number in work.rounds(batches, "re-ranking"):
        if number >= len(own):
            continue
        start = own[number] * size
        positions, images, queries = pairs.of_images(start, min(start + size, count))
        positions = positions.to(work.device)
        for scores, tokens in zip(logits, gallery.tokens):
            with work.autocast():
                scores[positions] = matcher.logits(tokens[number], images, queries)
    if work.ranks.distributed:
        for scores in logits:
            # Every pair was judged by one process and is 0 on the others, so the sum is exact.
            dist.all_reduce(scores)
    return [scores.view(candidates.shape) for scores in logits]

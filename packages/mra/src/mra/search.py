"""`mra-index` and `mra-search`: find the images of one's own folder that fit a sentence."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from mra.config import load_config
from mra.data.transforms import build_transforms
from mra.model.network import Retrieval
from mra.retrieval.encode import encode_images, encode_texts
from mra.retrieval.rerank import IMAGE_CHUNK, SIMILARITY_WEIGHT, Matcher, match_logits
from mra.text.augmentation import pre_caption
from mra.text.tokens import build_tokenizer, tokenize
from tbps_common.errors import CheckpointError, InputError
from tbps_common.images import read_image
from tbps_common.ranking import rerank
from tbps_common.report.pictures import Hit, RankedQuery, ranked_list
from tbps_common.run.batches import usable_workers
from tbps_common.run.checkpoint import find_state_dict, fingerprint, load_checkpoint_file
from tbps_common.run.device import choose_device
from tbps_common.search.old_gallery import GalleryIndex, complete_index, find_images

# What of a configuration decides the features, beside the weights.
_FEATURE_KEYS = ("h", "w", "max_tokens", "max_words", "icfg_rstp", "test_hflip")


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, and the configuration it was trained with."""

    model: Retrieval
    config: dict[str, Any]
    tokenizer: Any
    device: torch.device
    fingerprint: str
    """Of the weights, and of the settings that decide the features."""


def index(flags: argparse.Namespace) -> int:
    """Build an index of a folder's images, or add those that it lacks."""
    paths = find_images(flags.images)
    if Path(flags.out).exists():  # opened before the model is loaded, so that a damaged one is reported at once
        GalleryIndex.open(flags.out)
    trained = open_trained(flags)
    batch_size = flags.batch_size or int(trained.config.get("batch_size_test", 40))

    def encode(missing: list[str]) -> Iterator[tuple[list[str], Tensor]]:
        return image_features(trained, missing, batch_size, flags.num_workers)

    print(complete_index(flags.out, paths, encode, fingerprint=trained.fingerprint, package="mra"))
    return 0


def search(flags: argparse.Namespace) -> int:
    """Rank the images of an index for one sentence, print them, and draw them."""
    if not flags.text.strip():
        raise InputError("--text is empty: describe the person to look for")
    GalleryIndex.open(flags.index)
    trained = open_trained(flags)
    gallery = GalleryIndex.open(flags.index, fingerprint=trained.fingerprint)
    embeds, atts, feature = text_feature(trained, flags.text)
    positions, scores = gallery.search(feature, topk=len(gallery) if flags.rerank else flags.topk)
    if flags.rerank:
        judged = [gallery.image_path(place) for place in positions[0, : flags.rerank].tolist()]
        scores = reranked(trained, judged, scores, embeds, atts)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        positions = positions.gather(1, order)

    shown = min(flags.topk, len(gallery))
    places = zip(positions[0, :shown].tolist(), scores[0, :shown].tolist())
    hits = [Hit(gallery.image_path(place), score) for place, score in places]
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:3d}  {hit.score:7.4f}  {hit.image}")
    ranked_list(flags.output, [RankedQuery(text=flags.text, hits=hits)], columns=max(1, shown))
    print(f"wrote {flags.output}")
    return 0


def open_trained(flags: argparse.Namespace) -> Trained:
    """Build the model of a checkpoint and load its weights.

    The configuration is the file of `--config`, or else what the checkpoint holds of it. Of the text encoder's folder
    only the vocabulary is read.

    Raises:
        InputError: the configuration, the vocabulary or the device cannot be used.
        CheckpointError: the checkpoint is damaged, or of another model.
    """
    device = choose_device(flags.device)
    state, rest = find_state_dict(
        load_checkpoint_file(flags.checkpoint, trust=flags.trust_checkpoint), source=flags.checkpoint
    )
    config = load_config(flags.config) if flags.config else rest.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"{flags.checkpoint} holds no configuration: name the one it was trained with, such as --config configs/cuhk.yaml"
        )
    missing = [key for key in ("h", "w", "max_tokens", "max_words", "text_encoder") if key not in config]
    if missing:
        raise InputError(f"{flags.config or flags.checkpoint}: the configuration is missing {', '.join(missing)}")
    if flags.text_encoder:
        config = {**config, "text_encoder": flags.text_encoder}
    tokenizer = build_tokenizer(config["text_encoder"])
    model = Retrieval(config, init_backbones=False)
    model.load_pretrained(state, config, is_eval=True)
    settings = {key: config.get(key) for key in _FEATURE_KEYS}
    return Trained(model.to(device).eval(), dict(config), tokenizer, device, fingerprint(state, settings))


def image_features(
    trained: Trained, paths: list[str], batch_size: int, num_workers: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Paths and features `[B, D]` of one batch of images after the other; with `test_hflip` also of their mirror images.

    Raises:
        DatasetError: an image cannot be read.
    """
    dataset: Any = _Images(trained, paths)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, num_workers=min(usable_workers(num_workers), len(paths))
    )
    done = 0
    for batch in tqdm(loader, desc="images", unit="batch", leave=False, disable=None):
        images = batch.to(trained.device)
        features = encode_images(trained.model, images, batch_size)[1]
        if trained.config.get("test_hflip"):
            features = (features + encode_images(trained.model, images.flip(3), batch_size)[1]) / 2
        yield paths[done : done + len(images)], features.cpu()
        done += len(images)


def text_feature(trained: Trained, sentence: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token embeddings `[1, T, D_t]`, mask `[1, T]` and unit-norm feature `[1, D]` of a sentence."""
    config = trained.config
    try:
        text = pre_caption(sentence, int(config["max_words"]), bool(config.get("icfg_rstp", False)))
    except ValueError as error:
        raise InputError(f"--text cannot be used: {error}") from error
    ids, atts = (part.to(trained.device) for part in tokenize(trained.tokenizer, [text], int(config["max_tokens"])))
    embeds, feature = encode_texts(trained.model, ids, atts)
    return embeds, atts, feature.cpu()


def reranked(trained: Trained, paths: list[str], scores: Tensor, embeds: Tensor, atts: Tensor) -> Tensor:
    """Final scores `[1, G]` when the fusion encoder judges the first images.

    Args:
        trained: the model.
        paths: the most similar images, best first.
        scores: `[1, G]` similarities of all images, best first.
        embeds: `[1, T, D_t]` token embeddings of the sentence.
        atts: `[1, T]` its mask.
    """
    matcher = Matcher(trained.model, embeds, atts)
    views = 2 if trained.config.get("test_hflip") else 1
    logits: list[list[Tensor]] = [[] for _ in range(views)]
    images = _Images(trained, paths)
    for start in range(0, len(paths), IMAGE_CHUNK):
        chosen = range(start, min(start + IMAGE_CHUNK, len(paths)))
        batch = torch.stack([images[number] for number in chosen]).to(trained.device)
        for mirrored, parts in enumerate(logits):
            tokens = encode_images(trained.model, batch.flip(3) if mirrored else batch)[0]
            parts.append(match_logits(matcher, torch.arange(len(batch))[None], tokens).cpu())
    joined = [torch.cat(parts, dim=1) for parts in logits]
    return rerank(
        scores,
        torch.arange(len(paths))[None],
        joined[0],
        itm_flip=joined[1] if views == 2 else None,
        weight=SIMILARITY_WEIGHT,
    )


class _Images:
    """Images as tensors, by number."""

    def __init__(self, trained: Trained, paths: list[str]):
        self._transform, self._paths = build_transforms(trained.config)["test"], paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> Tensor:
        return self._transform(read_image(self._paths[number], as_shown=True))

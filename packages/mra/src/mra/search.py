"""`mra-index` and `mra-search`: find the images of one's own folder that fit a sentence."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbps_common.errors import CheckpointError, InputError
from tbps_common.run.arguments import HelpFormatter, whole_number

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mra.model import Retrieval

INDEX_DESCRIPTION = """\
Compute the features of all images of a folder once, for mra-search:

  mra-index --checkpoint data/checkpoint/ft_cuhk.pth --images FOLDER --out gallery.safetensors

An index that exists already is completed with the images it lacks.
"""
SEARCH_DESCRIPTION = """\
Find the images of an index that fit a sentence, best first:

  mra-search --checkpoint data/checkpoint/ft_cuhk.pth --index gallery.safetensors --text "a man with a red backpack"

With --rerank 32 the fusion encoder judges the 32 most similar images (their files are read again for it), which is
slower and more accurate.
"""

# What of a configuration decides the features, beside the weights.
_FEATURE_KEYS = ("h", "w", "max_tokens", "max_words", "icfg_rstp", "test_hflip")


@dataclass(frozen=True)
class Trained:
    """A trained model in evaluation mode, and the configuration it was trained with."""

    model: "Retrieval"
    config: dict[str, Any]
    tokenizer: Any
    device: "torch.device"
    fingerprint: str
    """Of the weights, and of the settings that decide the features."""


def index(argv: list[str]) -> int:
    """Build an index of a folder's images, or add those that it lacks."""
    parser = _parser("mra-index", INDEX_DESCRIPTION)
    parser.add_argument("--images", required=True, help="folder of images, searched with its sub-folders")
    parser.add_argument("--out", default="gallery.safetensors", help="index to write or to complete")
    parser.add_argument("--batch_size", type=whole_number(1), help="images encoded at once (default: batch_size_test)")
    parser.add_argument("--num_workers", type=whole_number(0), default=4, help="processes that load images")
    flags = parser.parse_args(argv)
    _check_checkpoint(flags)

    from tbps_common.search.gallery import GalleryIndex, complete_index, find_images

    paths = find_images(flags.images)
    if Path(flags.out).exists():  # opened before the model is loaded, so that a damaged one is told at once
        GalleryIndex.open(flags.out)
    trained = open_trained(flags)
    batch_size = flags.batch_size or int(trained.config.get("batch_size_test", 40))

    def encode(missing: list[str]) -> "Iterator[tuple[list[str], Tensor]]":
        return image_features(trained, missing, batch_size, flags.num_workers)

    print(complete_index(flags.out, paths, encode, fingerprint=trained.fingerprint, package="mra"))
    return 0


def search(argv: list[str]) -> int:
    """Rank the images of an index for one sentence, print them, and draw them."""
    parser = _parser("mra-search", SEARCH_DESCRIPTION)
    parser.add_argument("--index", default="gallery.safetensors", help="index of mra-index")
    parser.add_argument("--text", required=True, help="whom to look for")
    parser.add_argument("--topk", type=whole_number(1), default=10, help="images to show")
    parser.add_argument(
        "--rerank", type=whole_number(0), default=0, help="most similar images that the fusion encoder judges; 0: none"
    )
    parser.add_argument("--output", default="hits.png", help="picture to write")
    flags = parser.parse_args(argv)
    if not flags.text.strip():
        raise InputError("--text is empty: describe the person to look for")
    _check_checkpoint(flags)

    from tbps_common.search.gallery import GalleryIndex

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

    from tbps_common.report.pictures import Hit, RankedQuery, ranked_list

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
    from mra.config import load_config
    from mra.model import Retrieval
    from mra.text import build_tokenizer
    from tbps_common.run.checkpoint import find_state_dict, fingerprint, load_checkpoint_file
    from tbps_common.run.device import choose_device

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
        raise InputError(f"{flags.config or flags.checkpoint}: the configuration lacks {', '.join(missing)}")
    if flags.text_encoder:
        config = {**config, "text_encoder": flags.text_encoder}
    tokenizer = build_tokenizer(config["text_encoder"])
    model = Retrieval(config, init_backbones=False)
    model.load_pretrained(state, config, is_eval=True)
    settings = {key: config.get(key) for key in _FEATURE_KEYS}
    return Trained(model.to(device).eval(), dict(config), tokenizer, device, fingerprint(state, settings))


def image_features(
    trained: Trained, paths: list[str], batch_size: int, num_workers: int
) -> "Iterator[tuple[list[str], Tensor]]":
    """Paths and features `[B, D]` of one batch of images after the other; with `test_hflip` also of their mirror images.

    Raises:
        DatasetError: an image cannot be read.
    """
    import torch
    from tqdm import tqdm

    from mra.retrieval import encode_images

    dataset: Any = _Images(trained, paths)
    loader = torch.utils.data.DataLoader(dataset, batch_size=batch_size, num_workers=min(num_workers, len(paths)))
    done = 0
    for batch in tqdm(loader, desc="images", unit="batch", leave=False, disable=None):
        images = batch.to(trained.device)
        features = encode_images(trained.model, images, batch_size)[1]
        if trained.config.get("test_hflip"):
            features = (features + encode_images(trained.model, images.flip(3), batch_size)[1]) / 2
        yield paths[done : done + len(images)], features.cpu()
        done += len(images)


def text_feature(trained: Trained, sentence: str) -> "tuple[Tensor, Tensor, Tensor]":
    """Token embeddings `[1, T, D_t]`, mask `[1, T]` and unit-norm feature `[1, D]` of a sentence."""
    from mra.retrieval import encode_texts
    from mra.text import pre_caption, tokenize

    config = trained.config
    try:
        text = pre_caption(sentence, int(config["max_words"]), bool(config.get("icfg_rstp", False)))
    except ValueError as error:
        raise InputError(f"--text cannot be used: {error}") from error
    ids, atts = (part.to(trained.device) for part in tokenize(trained.tokenizer, [text], int(config["max_tokens"])))
    embeds, feature = encode_texts(trained.model, ids, atts)
    return embeds, atts, feature.cpu()


def reranked(trained: Trained, paths: list[str], scores: "Tensor", embeds: "Tensor", atts: "Tensor") -> "Tensor":
    """Final scores `[1, G]` when the fusion encoder judges the first images.

    Args:
        trained: the model.
        paths: the most similar images, best first.
        scores: `[1, G]` similarities of all images, best first.
        embeds: `[1, T, D_t]` token embeddings of the sentence.
        atts: `[1, T]` its mask.
    """
    import torch

    from mra.retrieval import encode_images
    from mra.retrieval.rerank import IMAGE_CHUNK, SIMILARITY_WEIGHT, Matcher, match_logits
    from tbps_common.ranking import rerank

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
        from mra.data import build_transforms

        self._transform, self._paths = build_transforms(trained.config)["test"], paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> "Tensor":
        from tbps_common.images import read_image

        return self._transform(read_image(self._paths[number]))


def _check_checkpoint(flags: argparse.Namespace) -> None:
    # Before torch is imported, so that a wrong path is told at once.
    if not Path(flags.checkpoint).is_file():
        raise CheckpointError(f"--checkpoint {flags.checkpoint} does not exist: give the weights of a trained model")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="trained weights, such as data/checkpoint/ft_cuhk.pth")
    parser.add_argument(
        "--config", help="configuration of the weights, such as configs/cuhk.yaml (default: the one in the checkpoint)"
    )
    parser.add_argument("--text_encoder", help="folder with vocab.txt (default: the configuration's)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--trust_checkpoint",
        "--trust-checkpoint",
        action="store_true",
        help="read a checkpoint that only Python's pickle can read; such a file can run any code",
    )
    return parser

"""`cmlfa-index` and `cmlfa-search`: find the images of one's own folder that match a sentence."""

import argparse
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader

from cmlfa.datasets import ImageDataset, build_transforms, tokenize
from cmlfa.datasets.tokenizer import shared_tokenizer
from cmlfa.options import Options
from cmlfa.trained import TrainedModel, open_trained
from tbps_common.report.pictures import Hit, RankedQuery, ranked_list
from tbps_common.run.batches import usable_workers
from tbps_common.run.progress import progress_bar
from tbps_common.search.old_gallery import GalleryIndex, complete_index, find_images


def index(flags: argparse.Namespace, options: Options) -> None:
    """Build an index of a folder's images, or add those that it lacks."""
    paths = find_images(flags.images)
    trained = open_trained(flags, options)
    _say_batch_dependence(
        trained, f"images are encoded in batches of {options.test_batch_size} in the order of their paths"
    )
    said = complete_index(
        flags.out,
        paths,
        lambda new: image_features(trained, new),
        fingerprint=trained.fingerprint,
        package="cmlfa",
    )
    print(said)


def search(flags: argparse.Namespace, options: Options) -> None:
    """Rank the images of an index for one sentence, print them, and draw them."""
    GalleryIndex.open(flags.index)  # before the model is loaded, so that a wrong path is reported at once
    trained = open_trained(flags, options)
    gallery = GalleryIndex.open(flags.index, fingerprint=trained.fingerprint)
    _say_batch_dependence(trained, "the sentence is encoded alone, the images were encoded in batches")
    positions, scores = gallery.search(text_feature(trained, flags.text), topk=flags.topk)
    hits = [
        Hit(gallery.image_path(position), score) for position, score in zip(positions[0].tolist(), scores[0].tolist())
    ]
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:3d}  {hit.score:7.4f}  {hit.image}")
    ranked_list(flags.output, [RankedQuery(text=flags.text, hits=hits)])
    print(f"wrote {flags.output}")


def image_features(trained: TrainedModel, paths: list[str]) -> Iterator[tuple[list[str], Tensor]]:
    """Paths and unit-norm features `[B, D]` of one batch of images after the other.

    Raises:
        DatasetError: an image cannot be read.
    """
    options = trained.options
    transform = build_transforms(options.img_size, aug=False, is_train=False)
    loader: Iterable[tuple[Tensor, Tensor]] = DataLoader(
        ImageDataset(range(len(paths)), paths, transform, as_shown=True),
        batch_size=options.test_batch_size,
        num_workers=usable_workers(options.num_workers),
        pin_memory=trained.device.type == "cuda",
    )
    with progress_bar(len(paths), unit="image") as bar, torch.no_grad():
        for places, images in loader:
            features = trained.model.encode_image(images.to(trained.device))
            yield [paths[place] for place in places.tolist()], normalize(features, dim=1).cpu()
            bar.update(len(places))


@torch.no_grad()
def text_feature(trained: TrainedModel, sentence: str) -> Tensor:
    """Unit-norm feature `[1, D]` of a sentence, encoded as a batch of one."""
    ids = tokenize(sentence, shared_tokenizer(), trained.options.text_length)
    return normalize(trained.model.encode_text(ids[None].to(trained.device)), dim=1).cpu()


def _say_batch_dependence(trained: TrainedModel, how: str) -> None:
    if trained.options.lfa_attention == "batch":
        print(f"note: trained with --lfa_attention batch, so a feature depends on the batch it is computed in; {how}")

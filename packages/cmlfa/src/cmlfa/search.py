"""`cmlfa-index` and `cmlfa-search`: find the images of one's own folder that fit a sentence."""

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from cmlfa.trained import TrainedModel, add_run_flags, open_trained, read_run
from tbps_common.errors import InputError
from tbps_common.run.arguments import whole_number

if TYPE_CHECKING:
    from torch import Tensor

INDEX_DESCRIPTION = """\
Compute the features of all images of a folder once, for cmlfa-search:

  cmlfa-index --config_file RUN/configs.yaml --images FOLDER --out gallery.safetensors

An index that exists already is completed with the images it lacks.
"""
SEARCH_DESCRIPTION = """\
Find the images of an index that fit a sentence, best first:

  cmlfa-search --config_file RUN/configs.yaml --index gallery.safetensors --text "a man with a red backpack"
"""


def index(argv: list[str]) -> int:
    """Build an index of a folder's images, or add those that it lacks."""
    parser = _parser("cmlfa-index", INDEX_DESCRIPTION)
    parser.add_argument("--images", required=True, help="folder of images, searched with its sub-folders")
    parser.add_argument(
        "--out", default="gallery.safetensors", help="index to write or to complete (default: %(default)s)"
    )
    parser.add_argument(
        "--test_batch_size", "--batch_size", type=whole_number(1), help="images encoded at once (default: as stored)"
    )
    parser.add_argument("--num_workers", type=whole_number(0), help="processes that load images (default: as trained)")
    flags = parser.parse_args(argv)
    args = read_run(flags, ("test_batch_size", "num_workers"))

    from tbps_common.search.gallery import complete_index, find_images

    paths = find_images(flags.images)
    trained = open_trained(flags, args)
    _say_batch_dependence(
        trained, f"images are encoded in batches of {args.test_batch_size} in the order of their paths"
    )
    said = complete_index(
        flags.out,
        paths,
        lambda new: image_features(trained, new),
        fingerprint=trained.fingerprint,
        package="cmlfa",
    )
    print(said)
    return 0


def search(argv: list[str]) -> int:
    """Rank the images of an index for one sentence, print them, and draw them."""
    parser = _parser("cmlfa-search", SEARCH_DESCRIPTION)
    parser.add_argument("--index", default="gallery.safetensors", help="index of cmlfa-index (default: %(default)s)")
    parser.add_argument("--text", required=True, help="whom to look for")
    parser.add_argument("--topk", type=whole_number(1), default=10, help="images to show (default: %(default)s)")
    parser.add_argument("--output", default="hits.png", help="picture to write (default: %(default)s)")
    flags = parser.parse_args(argv)
    if not flags.text.strip():
        raise InputError("--text is empty: describe the person to look for")
    args = read_run(flags, ())

    from tbps_common.search.gallery import GalleryIndex

    # Opened once before the model is loaded, so that a wrong path is told at once.
    GalleryIndex.open(flags.index)
    trained = open_trained(flags, args)
    gallery = GalleryIndex.open(flags.index, fingerprint=trained.fingerprint)
    _say_batch_dependence(trained, "the sentence is encoded alone, the images were encoded in batches")
    positions, scores = gallery.search(text_feature(trained, flags.text), topk=flags.topk)

    from tbps_common.report.pictures import Hit, RankedQuery, ranked_list

    hits = [
        Hit(gallery.image_path(position), score) for position, score in zip(positions[0].tolist(), scores[0].tolist())
    ]
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:3d}  {hit.score:7.4f}  {hit.image}")
    ranked_list(flags.output, [RankedQuery(text=flags.text, hits=hits)])
    print(f"wrote {flags.output}")
    return 0


def image_features(trained: TrainedModel, paths: list[str]) -> "Iterator[tuple[list[str], Tensor]]":
    """Paths and unit-norm features `[B, D]` of one batch of images after the other.

    Raises:
        DatasetError: an image cannot be read.
    """
    import torch
    from torch.nn.functional import normalize
    from tqdm import tqdm

    from cmlfa.datasets import build_transforms
    from cmlfa.datasets.items import ImageDataset

    args = trained.args
    transform = build_transforms(tuple(args.img_size), aug=False, is_train=False)
    loader: Iterable[tuple[Tensor, Tensor]] = torch.utils.data.DataLoader(
        ImageDataset(range(len(paths)), paths, transform),
        batch_size=args.test_batch_size,
        num_workers=args.num_workers,
        pin_memory=trained.device.type == "cuda",
    )
    for places, images in tqdm(loader, desc="images", unit="batch", leave=False, disable=None):
        with torch.no_grad():
            features = trained.model.encode_image(images.to(trained.device))
        yield [paths[place] for place in places.tolist()], normalize(features, dim=1).cpu()


def text_feature(trained: TrainedModel, sentence: str) -> "Tensor":
    """Unit-norm feature `[1, D]` of a sentence, encoded as a batch of one."""
    import torch
    from torch.nn.functional import normalize

    from cmlfa.datasets import tokenize
    from cmlfa.datasets.items import shared_tokenizer

    ids = tokenize(sentence, shared_tokenizer(), trained.args.text_length)
    with torch.no_grad():
        return normalize(trained.model.encode_text(ids[None].to(trained.device)), dim=1).cpu()


def _say_batch_dependence(trained: TrainedModel, how: str) -> None:
    if trained.args.lfa_attention == "batch":
        print(f"note: trained with --lfa_attention batch, so a feature depends on the batch it is computed in; {how}")


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_flags(parser)
    return parser

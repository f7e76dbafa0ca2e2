"""`fafa-index` and `fafa-search`: find the person of a picture, changed as a sentence says, in one's own folder."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fafa.trained import TrainedModel, add_loading_flags, add_run_flags, open_trained, read_run
from tbps_common.errors import InputError
from tbps_common.run.arguments import HelpFormatter, whole_number

if TYPE_CHECKING:
    from torch import Tensor

INDEX_DESCRIPTION = """\
Compute the features of all images of a folder once, for fafa-search:

  fafa-index --exp-dir RUN --model-name tuned_recall_at1_epoch.pt --images FOLDER --out gallery.safetensors

An index that exists already is completed with the images it lacks.
"""
SEARCH_DESCRIPTION = """\
Find images of the person of a picture, with the changes that a sentence names, best first:

  fafa-search --exp-dir RUN --model-name tuned_recall_at1_epoch.pt --index gallery.safetensors \\
    --image reference.jpg --text "now wearing a red coat"
"""


def index(argv: list[str]) -> int:
    """Build an index of a folder's images, or add those that it lacks."""
    parser = _parser("fafa-index", INDEX_DESCRIPTION)
    parser.add_argument("--images", required=True, help="folder of images, searched with its sub-folders")
    parser.add_argument("--out", default="gallery.safetensors", help="index to write or to complete")
    add_loading_flags(parser)
    flags = parser.parse_args(argv)
    run = read_run(flags)

    from tbps_common.search.gallery import complete_index, find_images

    paths = find_images(flags.images)
    trained = open_trained(run, flags.device, trust=flags.trust_checkpoint)
    sentence = complete_index(
        flags.out,
        paths,
        lambda images: _encoded(trained, images, flags.batch_size, flags.num_workers),
        fingerprint=trained.fingerprint,
        package="fafa",
        reduce="topk_mean",
        k=trained.model.fda_k,
    )
    print(sentence)
    return 0


def search(argv: list[str]) -> int:
    """Rank the images of an index for one picture and sentence, print them, and draw them."""
    parser = _parser("fafa-search", SEARCH_DESCRIPTION)
    parser.add_argument("--index", default="gallery.safetensors", help="index of fafa-index")
    parser.add_argument("--image", required=True, help="picture of the person")
    parser.add_argument("--text", required=True, help="what is different in the images to find")
    parser.add_argument("--topk", type=whole_number(1), default=10, help="images to show")
    parser.add_argument("--output", default="hits.png", help="picture to write")
    flags = parser.parse_args(argv)
    if not flags.text.strip():
        raise InputError("--text is empty: say what is different in the images to find")
    run = read_run(flags)

    from tbps_common.images import read_image

    image = read_image(flags.image)

    from tbps_common.search.gallery import GalleryIndex

    # Opened once before the model is loaded, so that a wrong path is told at once.
    GalleryIndex.open(flags.index)
    trained = open_trained(run, flags.device, trust=flags.trust_checkpoint)
    gallery = GalleryIndex.open(flags.index, fingerprint=trained.fingerprint)

    from fafa.processors import BlipCaptionProcessor
    from tbps_common.report.pictures import Hit, RankedQuery, ranked_list

    model = trained.model
    states = model.evaluation_states(trained.transforms.test(image)[None].to(trained.device))
    query = model.query_features(states, [BlipCaptionProcessor()(flags.text)]).cpu()
    positions, scores = gallery.search(query, topk=flags.topk)
    hits = [
        Hit(gallery.image_path(position), score) for position, score in zip(positions[0].tolist(), scores[0].tolist())
    ]
    for rank, hit in enumerate(hits, start=1):
        print(f"{rank:3d}  {hit.score:7.4f}  {hit.image}")
    ranked_list(flags.output, [RankedQuery(text=flags.text, image=flags.image, hits=hits)])
    print(f"wrote {flags.output}")
    return 0


def _encoded(
    trained: TrainedModel, paths: list[str], batch_size: int, num_workers: int
) -> "Iterator[tuple[list[str], Tensor]]":
    """Paths and features `[B, T, D]` of one batch of images after the other."""
    from fafa.data import GalleryDataset
    from fafa.extraction import Extractor

    dataset = GalleryDataset(range(len(paths)), paths, trained.transforms.test)
    extractor = Extractor(trained.model, trained.device, batch_size=batch_size, num_workers=num_workers, progress=True)
    for first, features in extractor.gallery_batches(dataset):
        yield paths[first : first + len(features)], features


def _parser(name: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=name, description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    add_run_flags(parser)
    return parser

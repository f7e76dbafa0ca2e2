"""`fafa-index` and `fafa-search`: find the person of a picture, changed as a sentence says, in one's own folder."""

import argparse
from collections.abc import Iterator

from torch import Tensor

from fafa.data import GalleryDataset
from fafa.features import Extractor
from fafa.processors import BlipCaptionProcessor
from fafa.run_directory import TrainedRun
from fafa.trained import TrainedModel, open_trained
from tbps_common.errors import InputError
from tbps_common.images import read_image
from tbps_common.report.pictures import Hit, RankedQuery, ranked_list
from tbps_common.search.old_gallery import GalleryIndex, complete_index, find_images


def index(run: TrainedRun, flags: argparse.Namespace) -> int:
    """Build an index of a folder's images, or add those that it lacks; returns the exit status 0."""
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


def _encoded(
    trained: TrainedModel, paths: list[str], batch_size: int, num_workers: int
) -> Iterator[tuple[list[str], Tensor]]:
    """Paths and features `[B, T, D]` of one batch of images after the other."""
    dataset = GalleryDataset(range(len(paths)), paths, trained.transforms.test, as_shown=True)
    extractor = Extractor(trained.model, batch_size=batch_size, num_workers=num_workers, progress=True)
    for first, features in extractor.gallery_batches(dataset):
        yield paths[first : first + len(features)], features.cpu()


def search(run: TrainedRun, flags: argparse.Namespace) -> int:
    """Rank the images of an index for one picture and sentence, print them, and draw them; returns the exit status 0."""
    if not flags.text.strip():
        raise InputError("--text is empty: say what should be different in the images to find")
    image = read_image(flags.image, as_shown=True)
    GalleryIndex.open(flags.index)  # a wrong path costs less before the model is loaded
    trained = open_trained(run, flags.device, trust=flags.trust_checkpoint)
    gallery = GalleryIndex.open(flags.index, fingerprint=trained.fingerprint)

    model = trained.model
    states = model.evaluation_states(trained.transforms.test(image)[None].to(model.device))
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

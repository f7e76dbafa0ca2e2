"""`visualize.py`: the images found for one caption in a row, the right one first, framed green or red."""

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch.nn.functional import normalize

from cmlfa.datasets import build_dataloader, tokenize
from cmlfa.metrics import Evaluator
from cmlfa.model.tokenizer import shared_tokenizer
from cmlfa.options import Options
from cmlfa.trained import open_trained
from tbps_common.datasets.raw import RawDataset
from tbps_common.errors import InputError
from tbps_common.files import atomic_path
from tbps_common.images import read_image
from tbps_common.ranking import similarity

# Each picture of the row is shown in this size (width, height), with the frame colours of the released figure.
PICTURE_SIZE = (128, 256)
RIGHT, WRONG = "lawngreen", "red"
DOTS_PER_INCH = 300


def visualize(flags: argparse.Namespace, options: Options, data: RawDataset) -> None:
    """Rank the test images for a caption or a sentence, draw the best ones, and print what was found.

    Args:
        flags: of `visualize_parser`.
        options: of the run, from `read_run`.
        data: the annotations of its data set.
    """
    trained = open_trained(flags, options)
    image_loader, text_loader, _ = build_dataloader(options, data)
    images, texts = image_loader.dataset, text_loader.dataset
    query = min(flags.query_idx, len(texts) - 1)
    if flags.caption is not None:
        ids = tokenize(flags.caption, shared_tokenizer(), options.text_length)
        text_loader, query = [(torch.tensor([-1]), ids[None])], 0  # a sentence of one's own is a batch of one

    captions, gallery, _, _ = Evaluator(image_loader, text_loader).compute_embedding(trained.model)
    scores = similarity(normalize(captions[query][None], dim=1), normalize(gallery, dim=1))[0].cpu()
    best = scores.argsort(descending=True, stable=True)[: flags.topk].tolist()

    if flags.caption is not None:
        print(f"caption: {flags.caption}")
        person, truth = None, None
    else:
        person = texts.caption_pids[query]
        truth = images.img_paths[_image_of_caption(data.test_annos, query)]
        print(f"query: {query}, id {person}\ncaption: {texts.captions[query]}\nground truth: {truth}")
    print(f"result ids: {' '.join(str(images.image_pids[place]) for place in best)}")
    for place in best:
        print(f"  {scores[place]:.4f}  {images.img_paths[place]}")
    matches = [None if person is None else images.image_pids[place] == person for place in best]
    draw_row(flags.output, truth, [(images.img_paths[place], match) for place, match in zip(best, matches)])
    print(f"wrote {flags.output}")


def draw_row(path: str | Path, truth: str | None, hits: list[tuple[str, bool | None]]) -> None:
    """Write the picture: the ground truth without a frame, then the hits with theirs.

    Args:
        path: picture to write; its suffix chooses the format.
        truth: image that was to be found, if there is one.
        hits: image and whether it is right (None: unknown, no frame), best first.

    Raises:
        DatasetError: an image cannot be read.
        InputError: matplotlib knows no format of that suffix.
    """
    row: list[tuple[str, bool | None]] = ([(truth, None)] if truth is not None else []) + hits
    figure = Figure(figsize=(1.1 * len(row), 2.2), layout="constrained")
    suffix = Path(path).suffix[1:].lower()
    formats = FigureCanvasAgg(figure).get_supported_filetypes()
    if suffix not in formats:
        raise InputError(f"--output {path} must end in a picture format, one of {', '.join(sorted(formats))}")
    axes: Any = figure.subplots(1, len(row), squeeze=False)[0]
    for axis, (image, match) in zip(axes, row):
        axis.imshow(read_image(image).resize(PICTURE_SIZE))
        axis.set_xticks([])
        axis.set_yticks([])
        for side in axis.spines.values():
            side.set_visible(match is not None)
            side.set_color(RIGHT if match else WRONG)
            side.set_linewidth(3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH, format=suffix)


def _image_of_caption(records: list[dict[str, Any]], query: int) -> int:
    """Position of the image that the caption of that number describes: captions are counted image by image."""
    for position, record in enumerate(records):
        query -= len(record["captions"])
        if query < 0:
            return position
    raise IndexError("there is no caption with that number")

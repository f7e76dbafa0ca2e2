"""`visualize.py`: the images found for one caption in a row, the right one first, framed green or red."""

import argparse
from pathlib import Path
from typing import Any

from cmlfa.preflight import check_data
from cmlfa.trained import add_run_flags, open_trained, read_run
from tbps_common.run.arguments import whole_number

DESCRIPTION = """\
Draw the ranked list of one caption of the test split, or of a sentence of your own:

  python visualize.py --config_file 'path/to/model_dir/configs.yaml' --query_idx 3900
  python visualize.py --config_file 'path/to/model_dir/configs.yaml' --caption "a woman in a red coat"

The picture is a row of the caption's own image (not for a sentence of your own) and the best images from left to right,
framed green if they show the right person and red if not.
"""

# Each picture of the row is shown in this size (width, height), with the frame colours of the released figure.
PICTURE_SIZE = (128, 256)
RIGHT, WRONG = "lawngreen", "red"
DOTS_PER_INCH = 300


def main(argv: list[str]) -> int:
    """Parse, load, rank, draw, and print what was found."""
    flags = _parse(argv)
    args = read_run(flags, ("root_dir", "test_batch_size", "num_workers"))
    data = check_data(args.dataset_name, args.root_dir, split="test", training=False)
    trained = open_trained(flags, args)

    import torch

    from cmlfa.datasets import build_dataloader, tokenize
    from cmlfa.datasets.items import shared_tokenizer
    from cmlfa.metrics import Evaluator
    from tbps_common.ranking import similarity

    image_loader, text_loader, _ = build_dataloader(args)
    images, texts = image_loader.dataset, text_loader.dataset
    query = None
    if flags.caption is None:
        query = min(flags.query_idx, len(texts) - 1)
    else:
        ids = tokenize(flags.caption, shared_tokenizer(), args.text_length)
        text_loader = [(torch.tensor([-1]), ids[None])]  # a sentence of one's own is a batch of one

    evaluator = Evaluator(image_loader, text_loader)
    captions, gallery, _, _ = evaluator.compute_embedding(trained.model)
    normalize = torch.nn.functional.normalize
    wanted = normalize(captions[query or 0][None], dim=1)
    scores = similarity(wanted, normalize(gallery, dim=1))[0].cpu()
    best = scores.argsort(descending=True, stable=True)[: flags.topk].tolist()

    if query is None:
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
    return 0


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from tbps_common.errors import InputError
    from tbps_common.files import atomic_path
    from tbps_common.images import read_image

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
    raise IndexError("there is no caption of that number")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_run_flags(parser)
    parser.add_argument("--root_dir", help="folder that holds the data set's folder (default: as trained)")
    parser.add_argument("--test_batch_size", type=whole_number(1), help="default: as stored")
    parser.add_argument(
        "--num_workers", type=whole_number(0), help="processes that load the data (default: as trained)"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--query_idx",
        type=whole_number(0),
        default=3900,
        help="caption of the test split, from 0 (default: 3900 or last)",
    )
    choice.add_argument("--caption", help="a sentence of your own")
    parser.add_argument("--topk", type=whole_number(1), default=10, help="images to show (default: 10)")
    parser.add_argument("--output", default="ui.png", help="picture to write (default: ui.png)")
    return parser.parse_args(argv)

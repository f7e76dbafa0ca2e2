"""What a training run reads and checks before torch is imported, so that a wrong path costs seconds, not minutes."""

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from fafa.model.settings import MODEL_CONFIG, read_model_config
from fafa.options import TrainingFlags
from tbps_common.datasets import ITCPR, SynCPRRecords, load_syncpr
from tbps_common.errors import CheckpointError, DatasetError, InputError
from tbps_common.images import check_images_exist, first_on_this_machine, missing_images, read_image
from tbps_common.models.source import is_model

logger = logging.getLogger("fafa.inputs")

_SHOWN = 5
_SIZE_SAMPLES = 8
_DIGESTED = 1000  # items at a time
# Of `squarepad_transform_train`: the crop, and the border it is taken with.
_CROP_HEIGHT, _CROP_WIDTH, _BORDER = 384, 192, 20


@dataclass(frozen=True)
class TrainingInputs:
    """What a training run reads before it builds a model."""

    triplets: SynCPRRecords
    itcpr: ITCPR
    model_config: dict[str, Any]
    """The resolved mapping of `--backbone`, all defaults filled in."""

    def fingerprints(self) -> dict[str, str]:
        """What tells one data set from another of the same size; where its folder lies does not count."""
        query, gallery = self.itcpr.query, self.itcpr.gallery
        return {
            "syncpr": _digest(zip(self.triplets.edit_captions, self.triplets.cpr_ids)),
            "itcpr": _digest((*query["captions"], query["instance_ids"], gallery["instance_ids"])),
        }


def _digest(items: Iterable[object]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    remaining = map(repr, items)
    while part := "".join(islice(remaining, _DIGESTED)):
        digest.update(part.encode())
    return digest.hexdigest()


def read_inputs(args: TrainingFlags, resumed: Path | None = None) -> TrainingInputs:
    """Read the model's configuration and both annotations, and check that a run can use them.

    Args:
        args: flags of a training run.
        resumed: run directory to go on with, whose model configuration is used instead of `--backbone`.

    Raises:
        InputError: a flag does not fit the model or the data, or a file is missing or damaged.
    """
    backbone = resumed / MODEL_CONFIG if resumed else args.backbone
    config = read_model_config(backbone, num_query_token=args.num_query_token)
    if args.fda_k > config["num_query_token"]:
        raise InputError(
            f"--fda-k {args.fda_k} is larger than the {config['num_query_token']} query tokens of the model: lower "
            "--fda-k, or raise --num-query-token"
        )
    if args.resume_path and "://" not in args.resume_path and not is_model(args.resume_path):
        raise CheckpointError(f"--resume-path {args.resume_path} is not a file: name an existing checkpoint")
    itcpr = check_itcpr(args.itcpr_root)
    return TrainingInputs(_read_syncpr(args), itcpr, config)


def check_itcpr(root: str) -> ITCPR:
    """Read ITCPR's annotation and see that its images exist.

    Raises:
        DatasetError: a file is missing or damaged, or no query has an image to find.
    """
    if not os.path.isdir(root):
        raise DatasetError(f"--itcpr-root {root} does not exist: give the folder of query.json and gallery.json")
    itcpr = ITCPR(root, verbose=False)
    for name, part in (("query.json", itcpr.query), ("gallery.json", itcpr.gallery)):
        if not part["img_paths"]:
            raise DatasetError(f"{os.path.join(itcpr.data_dir, name)} holds no records, so nothing can be evaluated")
    if not itcpr.query_iid_container & itcpr.gallery_iid_container:
        raise DatasetError(
            f"no query of {itcpr.data_dir} has an image to find: instance_ids of query.json and gallery.json do not "
            "match; use the two files of one download"
        )
    check_images_exist({*itcpr.query["img_paths"], *itcpr.gallery["img_paths"]}, root, flag="--itcpr-root")
    return itcpr


def _read_syncpr(args: TrainingFlags) -> SynCPRRecords:
    root = args.syncpr_data_path
    file = os.path.join(root, args.json_path)
    if not os.path.isdir(root):
        raise DatasetError(f"--syncpr-data-path {root} does not exist: give the folder that holds SynCPR's images")
    if not os.path.isfile(file):
        raise DatasetError(f"--json-path {args.json_path} names {file}, which does not exist: name SynCPR's annotation")
    records = load_syncpr(root, args.json_path)
    if not records:
        raise DatasetError(f"{file} holds no triplets, so there is nothing to train on")
    processes = _number_of_processes()
    if len(records) < args.batch_size * processes:
        several = f" on each of {processes} processes" if processes > 1 else ""
        raise InputError(
            f"{file} holds {len(records)} triplets, fewer than one batch of --batch-size {args.batch_size}{several}: "
            "lower --batch-size"
        )
    if first_on_this_machine():
        paths = {*records.reference_image_paths, *records.target_image_paths}
        if args.bad_images == "stop":
            check_images_exist(paths, root, flag="--syncpr-data-path")
        else:
            _check_some_exist(paths, root)
        if args.transform == "squarepad":
            _check_sizes(sorted(paths))
    return records


def _number_of_processes() -> int:
    text = os.environ.get("WORLD_SIZE", "1").strip()
    return int(text) if text.isdecimal() and int(text) else 1  # `Ranks` says what is wrong with other values


def _check_some_exist(paths: set[str], root: str) -> None:
    """Triplets without images are left out, as in the released code; but all of them are a wrong path."""
    missing = missing_images(paths)
    if len(missing) == len(paths):
        raise DatasetError(
            f"none of the {len(paths)} images named by the annotation is under {root} (for example {missing[0]}): check "
            "--syncpr-data-path"
        )
    if missing:
        logger.warning(
            "%d of %d training images are missing (%s); their triplets will be left out",
            len(missing),
            len(paths),
            _listed(missing),
        )


def _check_sizes(paths: list[str]) -> None:
    """`--transform squarepad` cuts its crop out of training images as they are: look at some of them.

    Raises:
        InputError: all of them are too small.
    """
    sizes = {}
    step = max(1, len(paths) // _SIZE_SAMPLES)
    for path in paths[::step][:_SIZE_SAMPLES]:
        try:
            sizes[path] = read_image(path).size
        except DatasetError:  # left out later, with its cause in the log
            continue
    small = [
        path
        for path, (width, height) in sizes.items()
        if width + _BORDER < _CROP_WIDTH or height + _BORDER < _CROP_HEIGHT
    ]
    large = [path for path, size in sizes.items() if path not in small and size != (_CROP_WIDTH, _CROP_HEIGHT)]
    if small and len(small) == len(sizes):
        width, height = sizes[small[0]]
        raise InputError(
            f"--transform squarepad crops {_CROP_HEIGHT} x {_CROP_WIDTH} pixels (height x width) out of training images "
            f"without resizing them, and {small[0]} has {height} x {width}: resize the images to "
            f"{_CROP_HEIGHT} x {_CROP_WIDTH}, or use --transform targetpad or resize"
        )
    if small:
        logger.warning(
            "%d of %d images checked are too small for --transform squarepad (%s); such triplets will be left out",
            len(small),
            len(sizes),
            _listed(small),
        )
    if large:
        logger.warning(
            "%d of %d images checked are not of %d x %d pixels (%s): --transform squarepad cuts a part out of them",
            len(large),
            len(sizes),
            _CROP_HEIGHT,
            _CROP_WIDTH,
            _listed(large),
        )


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (", ..." if len(items) > _SHOWN else "")

"""The processed fine-tuning files of MRA and APTM: one JSON list per data set and split."""

import logging
import os
from dataclasses import dataclass

from tbps_common.datasets.folder import Folder
from tbps_common.datasets.records import Files, Identity, as_list, iter_records, many_objects

logger = logging.getLogger("tbps_common.datasets")


@dataclass(frozen=True, slots=True)
class ProcessedTrain:
    """Training pairs: entry i of the three lists is one image with one caption; labels are 0..n_labels-1."""

    image_paths: list[str]
    captions: list[str]
    labels: list[int]
    n_labels: int


@dataclass(frozen=True, slots=True)
class ProcessedEval:
    """Gallery images with their persons, and all captions in file order with theirs; ids as stored."""

    image_paths: list[str]
    captions: list[str]
    g_pids: list[int]
    q_pids: list[int]


def load_processed_train(files: Files, image_root: str | os.PathLike[str]) -> ProcessedTrain:
    """Read training files `{"image", "caption": str, "image_id"}`, one object per caption.

    Labels number the distinct `image_id` 0..n-1 in order of first appearance over all files. Captions are as stored.

    Raises:
        DatasetError: a file or record cannot be used.
    """
    folder = Folder(image_root)
    image_paths, captions, labels = [], [], []
    label_of: dict[Identity, int] = {}
    with many_objects():
        for file in as_list(files):
            start = len(captions)
            for record in iter_records(file):
                if type(record.fields.get("caption")) is list:
                    raise record.error(
                        "caption", "holds a list, as evaluation files do; a training file has one string"
                    )
                image_paths.append(record.path("image", folder))
                captions.append(record.text("caption"))
                labels.append(label_of.setdefault(record.identity("image_id"), len(label_of)))
            warn_of_empty(file, captions[start:])
    return ProcessedTrain(image_paths, captions, labels, len(label_of))


def load_processed_eval(file: str | os.PathLike[str], image_root: str | os.PathLike[str]) -> ProcessedEval:
    """Read one evaluation file `{"image", "caption": [str, ...], "image_id"}`, one object per image.

    Raises:
        DatasetError: the file or a record cannot be used.
    """
    folder = Folder(image_root)
    result = ProcessedEval([], [], [], [])
    with many_objects():
        for record in iter_records(file):
            if type(record.fields.get("caption")) is str:
                raise record.error("caption", "holds a string, as training files do; an evaluation file has a list")
            captions, pid = record.texts("caption"), record.integer("image_id")
            result.image_paths.append(record.path("image", folder))
            result.captions.extend(captions)
            result.g_pids.append(pid)
            result.q_pids.extend([pid] * len(captions))
    warn_of_empty(file, result.captions)
    return result


def warn_of_empty(file: str | os.PathLike[str], captions: list[str]) -> None:
    """Log how many captions of a file hold no text."""
    empty = sum(not caption.strip() for caption in captions)
    if empty:
        logger.warning("%s: %d empty captions", os.fspath(file), empty)

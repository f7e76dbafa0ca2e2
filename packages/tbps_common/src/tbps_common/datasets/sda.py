"""SDA, MRA's synthetic pre-training set: images with a caption, and regions with phrases."""

import os
import sys
from dataclasses import dataclass

from tbps_common.datasets.json_records import Files, Folder, Identity, as_list, iter_records

# The 14 shards of the release, by the image folders they cover.
SHARDS = (
    *(f"sda_{start}_{start + 5000}.json" for start in range(0, 60000, 5000)),
    "sda_60000_64000.json",
    "sda_64000_70000.json",
)


@dataclass(frozen=True, slots=True)
class SDARecord:
    """One image with its regions; `boxes`, `logits`, `phrases` and `phrase_labels` have equal length, 0 allowed.

    Boxes are centre x, centre y, width, height, relative to the image's width and height. `logits` are the detection
    scores.
    """

    image_path: str
    caption: str
    boxes: list[list[float]]
    logits: list[float]
    phrases: list[str]
    image_label: int
    phrase_labels: list[int]


@dataclass(frozen=True, slots=True)
class SDA:
    """All records; image labels are 0..n_images-1, phrase labels n_images..n_labels-1."""

    records: list[SDARecord]
    n_images: int
    n_labels: int


def load_sda(files: Files, image_root: str | os.PathLike[str]) -> SDA:
    """Read SDA shards, one after the other.

    Image labels number the distinct `image_id` in order of first appearance over all files; phrase labels continue
    from there by first appearance of the phrase, so that equal phrases are positives of each other.

    Raises:
        DatasetError: a file or record cannot be used, or boxes, logits and phrases have different lengths.
    """
    folder = Folder(image_root)
    records: list[SDARecord] = []
    image_label: dict[Identity, int] = {}
    phrase_number: dict[str, int] = {}
    for file in as_list(files):
        for record in iter_records(file, "caption"):
            boxes, logits, phrases = record.boxes("boxes"), record.numbers("logits"), record.texts("phrases")
            if not len(boxes) == len(logits) == len(phrases):
                lengths = f"{len(boxes)} boxes, {len(logits)} logits, {len(phrases)} phrases"
                raise record.error("boxes", f"must be as long as logits and phrases, found {lengths}")
            phrases = [sys.intern(phrase) for phrase in phrases]  # they repeat thousands of times
            label = image_label.setdefault(record.identity("image_id"), len(image_label))
            numbers = [phrase_number.setdefault(phrase, len(phrase_number)) for phrase in phrases]
            path, caption = record.path("image", folder), record.text("caption")
            records.append(SDARecord(path, caption, boxes, logits, phrases, label, numbers))
    # Phrase labels start where image labels end, which is known only now. One int object per label is kept.
    shifted = [len(image_label) + number for number in range(len(phrase_number))]
    for record in records:
        record.phrase_labels[:] = [shifted[number] for number in record.phrase_labels]
    return SDA(records, len(image_label), len(image_label) + len(phrase_number))

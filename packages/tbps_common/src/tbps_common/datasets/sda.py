"""SDA, MRA's synthetic pre-training set: images with a caption, and regions with phrases."""

import os
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tbps_common.datasets.json_records import Files, Folder, Identity, as_list, iter_records
from tbps_common.packed import Packed, PackedNumbers, PackedStrings

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


class SDARecords(Packed[SDARecord]):
    """A list of `SDARecord`, stored in columns.

    Attributes:
        image_paths, captions, image_labels: of every record.
        phrases: the distinct phrases, in order of first appearance.
        first_phrase_label: label of the first of them.
    """

    def __init__(self) -> None:
        self.image_paths, self.captions, self.phrases = PackedStrings(), PackedStrings(), PackedStrings()
        self.image_labels, self.first_phrase_label = PackedNumbers("i"), 0
        self._region_ends, self._phrase_numbers = PackedNumbers("q"), PackedNumbers("i")
        self._logits, self._boxes = PackedNumbers("d"), PackedNumbers("d")

    def __len__(self) -> int:
        return len(self.image_labels)

    def append(
        self, image_path: str, caption: str, label: int, boxes: list[Any], logits: list[Any], phrases: list[int]
    ) -> None:
        """Add a record, with the numbers of its phrases."""
        self.image_paths.append(image_path)
        self.captions.append(caption)
        self.image_labels.append(label)
        self._boxes.values.extend(chain.from_iterable(boxes))
        self._logits.values.extend(logits)
        self._phrase_numbers.values.extend(phrases)
        self._region_ends.append(len(self._logits))

    def item(self, place: int) -> SDARecord:
        start, end = self._region_ends[place - 1] if place else 0, self._region_ends[place]
        corners = self._boxes.values[4 * start : 4 * end].tolist()
        numbers = self._phrase_numbers.values[start:end].tolist()
        return SDARecord(
            image_path=self.image_paths[place],
            caption=self.captions[place],
            boxes=[corners[corner : corner + 4] for corner in range(0, len(corners), 4)],
            logits=self._logits.values[start:end].tolist(),
            phrases=[self.phrases[number] for number in numbers],
            image_label=self.image_labels[place],
            phrase_labels=[self.first_phrase_label + number for number in numbers],
        )


@dataclass(frozen=True, slots=True)
class SDA:
    """All records; image labels are 0..n_images-1, phrase labels n_images..n_labels-1."""

    records: SDARecords
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
    records = SDARecords()
    image_label: dict[Identity, int] = {}
    phrase_number: dict[str, int] = {}
    for file in as_list(files):
        for record in iter_records(file, "caption"):
            boxes, logits, phrases = record.boxes("boxes"), record.numbers("logits"), record.texts("phrases")
            if not len(boxes) == len(logits) == len(phrases):
                lengths = f"{len(boxes)} boxes, {len(logits)} logits, {len(phrases)} phrases"
                raise record.error("boxes", f"must be as long as logits and phrases, found {lengths}")
            label = image_label.setdefault(record.identity("image_id"), len(image_label))
            numbers = [phrase_number.setdefault(phrase, len(phrase_number)) for phrase in phrases]
            path, caption = record.path("image", folder), record.text("caption")
            records.append(path, caption, label, boxes, logits, numbers)
    records.phrases = PackedStrings(phrase_number)
    records.first_phrase_label = len(image_label)
    return SDA(records, len(image_label), len(image_label) + len(phrase_number))

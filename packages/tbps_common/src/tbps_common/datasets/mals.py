"""MALS, APTM's synthetic pre-training set: one caption per generated image."""

import os
from dataclasses import dataclass

from tbps_common.datasets.json_records import Files, Folder, Numbers, as_list, iter_blocks
from tbps_common.packed import Packed, PackedNumbers, PackedStrings

# The 91 shards in the order DiaNA's configuration lists them.
SHARDS = (
    "g_4x_attrs.json",
    "g_c_g_a_attrs.json",
    *(f"g_c_g_a_{number}_attrs.json" for number in range(44)),
    "g_i_g_a_attrs.json",
    *(f"g_i_g_a_{number}_attrs.json" for number in range(44)),
)


@dataclass(frozen=True, slots=True)
class MALSRecord:
    """One image with its caption."""

    image_path: str
    label: int
    caption: str


class MALSRecords(Packed[MALSRecord]):
    """A list of `MALSRecord`, stored as the columns `image_paths`, `labels` and `captions`."""

    def __init__(self) -> None:
        self.image_paths, self.labels, self.captions = PackedStrings(), PackedNumbers("i"), PackedStrings()

    def __len__(self) -> int:
        return len(self.labels)

    def item(self, place: int) -> MALSRecord:
        return MALSRecord(self.image_paths[place], self.labels[place], self.captions[place])


def load_mals(files: Files, image_root: str | os.PathLike[str]) -> MALSRecords:
    """Read MALS shards, one after the other; labels number the distinct `image_id` by first appearance over all.

    Raises:
        DatasetError: a file or record cannot be used.
    """
    folder = Folder(image_root)
    records = MALSRecords()
    label_of = Numbers()
    for file in as_list(files):
        for block in iter_blocks(file, "caption"):
            records.labels.extend(map(label_of.__getitem__, block.identities("image_id")))
            records.image_paths.extend(block.paths("image", folder))
            records.captions.extend(block.texts("caption"))
    return records

"""MALS, APTM's synthetic pre-training set: one caption per generated image."""

import os
from dataclasses import dataclass

from tbps_common.datasets.json_records import Files, Folder, Identity, as_list, iter_records

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


def load_mals(files: Files, image_root: str | os.PathLike[str]) -> list[MALSRecord]:
    """Read MALS shards, one after the other; labels number the distinct `image_id` by first appearance over all.

    Raises:
        DatasetError: a file or record cannot be used.
    """
    folder = Folder(image_root)
    records: list[MALSRecord] = []
    label_of: dict[Identity, int] = {}
    for file in as_list(files):
        for record in iter_records(file, "caption"):
            label = label_of.setdefault(record.identity("image_id"), len(label_of))
            records.append(MALSRecord(record.path("image", folder), label, record.text("caption")))
    return records

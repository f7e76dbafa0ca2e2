"""SynCPR, FAFA's synthetic training set: a reference image, an edit caption and the target image."""

import os
import sys
from dataclasses import dataclass

from tbps_common.datasets.json_records import Folder, iter_records


@dataclass(frozen=True, slots=True)
class SynCPRRecord:
    """One triplet; records with equal `cpr_id` show the same change and are positives of each other."""

    reference_image_path: str
    target_image_path: str
    edit_caption: str
    cpr_id: int
    reference_caption: str | None
    target_caption: str | None


def load_syncpr(root: str | os.PathLike[str], json_path: str | os.PathLike[str] = "SynCPR.json") -> list[SynCPRRecord]:
    """Read the triplets.

    Args:
        root: folder of the images, which the annotation names relative to it.
        json_path: annotation file, relative to `root` or absolute.

    Raises:
        DatasetError: the file or a record cannot be used.
    """
    folder = Folder(root)
    file = os.path.join(os.fspath(root), os.fspath(json_path))
    records = []
    for record in iter_records(file, "edit_caption"):
        # Every image takes part in several triplets, and with it its path and caption.
        reference_caption = record.optional_text("reference_caption")
        target_caption = record.optional_text("target_caption")
        records.append(
            SynCPRRecord(
                reference_image_path=sys.intern(record.path("reference_image_path", folder)),
                target_image_path=sys.intern(record.path("target_image_path", folder)),
                edit_caption=record.text("edit_caption"),
                cpr_id=record.integer("cpr_id"),
                reference_caption=reference_caption and sys.intern(reference_caption),
                target_caption=target_caption and sys.intern(target_caption),
            )
        )
    return records

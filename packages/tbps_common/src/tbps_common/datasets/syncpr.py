"""SynCPR, FAFA's synthetic training set: a reference image, an edit caption and the target image."""

import os
from dataclasses import dataclass

from tbps_common.datasets.json_records import Folder, Numbers, iter_blocks
from tbps_common.packed import Packed, PackedNumbers, PackedStrings


@dataclass(frozen=True, slots=True)
class SynCPRRecord:
    """One triplet; records with equal `cpr_id` show the same change and are positives of each other."""

    reference_image_path: str
    target_image_path: str
    edit_caption: str
    cpr_id: int
    reference_caption: str | None
    target_caption: str | None


class SynCPRRecords(Packed[SynCPRRecord]):
    """A list of `SynCPRRecord`, stored in columns.

    Attributes:
        reference_image_paths, target_image_paths, edit_captions, cpr_ids: of every triplet.
    """

    def __init__(self) -> None:
        self.reference_image_paths, self.target_image_paths = PackedStrings(), PackedStrings()
        self.edit_captions, self.cpr_ids = PackedStrings(), PackedNumbers("q")
        # An image takes part in several triplets, and with it its caption, which is stored once. Places in `_captions` are
        # counted from 1; 0 for none.
        self._captions = PackedStrings()
        self._reference_captions, self._target_captions = PackedNumbers("i"), PackedNumbers("i")

    def __len__(self) -> int:
        return len(self.cpr_ids)

    def item(self, place: int) -> SynCPRRecord:
        numbers = self._reference_captions[place], self._target_captions[place]
        reference_caption, target_caption = (self._captions[number - 1] if number else None for number in numbers)
        return SynCPRRecord(
            reference_image_path=self.reference_image_paths[place],
            target_image_path=self.target_image_paths[place],
            edit_caption=self.edit_captions[place],
            cpr_id=self.cpr_ids[place],
            reference_caption=reference_caption,
            target_caption=target_caption,
        )

    def read(self, file: str, folder: Folder) -> None:
        """Add the records of a file."""
        number_of = Numbers({None: 0})
        for block in iter_blocks(file, "edit_caption"):
            self.reference_image_paths.extend(block.paths("reference_image_path", folder))
            self.target_image_paths.extend(block.paths("target_image_path", folder))
            self._reference_captions.extend(map(number_of.__getitem__, block.optional_texts("reference_caption")))
            self._target_captions.extend(map(number_of.__getitem__, block.optional_texts("target_caption")))
            self.edit_captions.extend(block.texts("edit_caption"))
            self.cpr_ids.extend(block.integers("cpr_id"))
        self._captions.extend(caption for caption in number_of if caption is not None)


def load_syncpr(root: str | os.PathLike[str], json_path: str | os.PathLike[str] = "SynCPR.json") -> SynCPRRecords:
    """Read the triplets.

    Args:
        root: folder of the images, which the annotation names relative to it.
        json_path: annotation file, relative to `root` or absolute.

    Raises:
        DatasetError: the file or a record cannot be used.
    """
    records = SynCPRRecords()
    records.read(os.path.join(os.fspath(root), os.fspath(json_path)), Folder(root))
    return records

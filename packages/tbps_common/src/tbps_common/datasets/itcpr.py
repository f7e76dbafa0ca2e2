"""ITCPR, FAFA's test set for composed person retrieval: queries of an image and a text, and a gallery."""

import os
from typing import Any

from tbps_common.datasets.json_records import Folder, iter_records
from tbps_common.datasets.table import log_table
from tbps_common.errors import DatasetError


class ITCPR:
    """Queries and gallery; a query's positives are the gallery items of equal instance id, -1 marks distractors.

    Attributes:
        data_dir: folder of the annotation files and the images: `<root>/datasets` if that holds query.json (the
            released code's layout), else `<root>` (the README's).
        query: dict of the lists `person_ids, img_paths, instance_ids, captions`.
        gallery: dict of the lists `person_ids, img_paths, instance_ids`.
        query_pid_container, query_iid_container, gallery_pid_container, gallery_iid_container: sets of the ids.
    """

    def __init__(self, root: str | os.PathLike[str], verbose: bool = True) -> None:
        """Read query.json and gallery.json.

        Args:
            root: folder of the data set.
            verbose: log the table of sizes.

        Raises:
            DatasetError: a file is missing or a record cannot be used.
        """
        self.data_dir = _data_dir(os.fspath(root))
        self.query = self._read("query.json", with_caption=True)
        self.gallery = self._read("gallery.json", with_caption=False)
        self.query_pid_container = set(self.query["person_ids"])
        self.query_iid_container = set(self.query["instance_ids"])
        self.gallery_pid_container = set(self.gallery["person_ids"])
        self.gallery_iid_container = set(self.gallery["instance_ids"])
        if verbose:
            rows = [
                ("query", len(self.query_iid_container), len(self.query["img_paths"])),
                ("gallery", len(self.gallery_iid_container), len(self.gallery["img_paths"])),
            ]
            log_table("ITCPR", ("subset", "iids", "images"), rows)

    def _read(self, name: str, with_caption: bool) -> dict[str, list[Any]]:
        folder = Folder(self.data_dir)
        file = os.path.join(self.data_dir, name)
        columns: dict[str, list[Any]] = {"person_ids": [], "img_paths": [], "instance_ids": []}
        if with_caption:
            columns["captions"] = []
        for record in iter_records(file, "caption" if with_caption else None):
            columns["person_ids"].append(record.integer("person_id"))
            columns["img_paths"].append(record.path("file_path", folder))
            columns["instance_ids"].append(record.integer("instance_id"))
            if with_caption:
                columns["captions"].append(record.text("caption"))
        return columns


def _data_dir(root: str) -> str:
    nested = os.path.join(root, "datasets")
    if os.path.isfile(os.path.join(nested, "query.json")):
        return nested
    for name in ("query.json", "gallery.json"):
        if not os.path.isfile(os.path.join(root, name)):
            raise DatasetError(
                f"ITCPR needs {os.path.join(root, name)} (or the same under {nested}): expected query.json, "
                "gallery.json, Celeb-reID/, PRCC/ and LAST/ in that folder; the annotations are the data set "
                "a1557811266/ITCPR on the Hugging Face hub."
            )
    return root

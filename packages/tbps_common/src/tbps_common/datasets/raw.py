"""CUHK-PEDES, ICFG-PEDES and RSTPReid as their authors distribute them: one annotation file and a folder of images."""

import logging
import os
from collections import Counter
from typing import Any, ClassVar

from tbps_common.datasets.json_records import Folder, Record, iter_records, without_collection
from tbps_common.datasets.table import log_table
from tbps_common.errors import DatasetError

logger = logging.getLogger("tbps_common.datasets")

TrainSample = tuple[int, int, str, str]
EvalSplit = dict[str, list[Any]]


class RawDataset:
    """One raw annotation tree, split into train, test and val in file order.

    Attributes:
        dataset_dir, img_dir, anno_path: where the data lie.
        train_annos, test_annos, val_annos: the records as stored.
        train: `(pid, image_id, img_path, caption)`, one tuple per caption; pids are 0..N-1, image_id counts the
            training images from 0 (an image without caption counts too).
        test, val: dict of the lists `image_pids, img_paths` (one entry per image) and `caption_pids, captions` (one
            per caption); pids as stored.
        train_id_container, test_id_container, val_id_container: sets of the pids of the three splits.
        unknown_splits: names other than train, test and val -> number of their records, which count as val.
    """

    name: ClassVar[str]
    annotation_names: ClassVar[tuple[str, ...]]  # the first that exists is read
    path_key: ClassVar[str] = "file_path"
    first_train_id: ClassVar[int] = 0
    image_tree: ClassVar[str]
    source: ClassVar[str]

    def __init__(self, root: str | os.PathLike[str] = "", verbose: bool = True) -> None:
        """Read the annotation file under `root`.

        Args:
            root: folder that holds the folder of the data set.
            verbose: log the table of subset sizes.

        Raises:
            DatasetError: a folder or the annotation file is missing, or a record cannot be used.
        """
        self.dataset_dir = os.path.join(os.fspath(root), self.name)
        self.img_dir = os.path.join(self.dataset_dir, "imgs")
        self.anno_path = self._find_annotation_file(os.fspath(root))
        with without_collection():
            self._read_records()
            self.train, self.train_id_container = self._training_samples()
            self.test, self.test_id_container = self._evaluation_split(self._test)
            self.val, self.val_id_container = self._evaluation_split(self._val)
            self.train_annos = [record.fields for record in self._train]
            self.test_annos = [record.fields for record in self._test]
            self.val_annos = [record.fields for record in self._val]
        del self._train, self._test, self._val
        if verbose:
            log_table(self.name, ("subset", "ids", "images", "captions"), self.sizes())

    def sizes(self) -> list[tuple[str, int, int, int]]:
        """Rows `subset, ids, images, captions` of train, test and val."""
        return [
            ("train", len(self.train_id_container), len(self.train_annos), len(self.train)),
            ("test", len(self.test_id_container), len(self.test_annos), len(self.test["captions"])),
            ("val", len(self.val_id_container), len(self.val_annos), len(self.val["captions"])),
        ]

    def _find_annotation_file(self, root: str) -> str:
        wanted = " or ".join(self.annotation_names)
        tree = f"expected {self.name}/{wanted} and {self.name}/imgs/{self.image_tree} under the root folder"
        if not os.path.isdir(self.dataset_dir):
            inside = any(os.path.exists(os.path.join(root, name)) for name in self.annotation_names)
            hint = "; give the folder above it as root" if inside else ""
            raise DatasetError(f"The folder {self.dataset_dir} does not exist: {tree}{hint}; {self.source}.")
        if not os.path.isdir(self.img_dir):
            raise DatasetError(f"The image folder {self.img_dir} does not exist: {tree}; {self.source}.")
        for name in self.annotation_names:
            path = os.path.join(self.dataset_dir, name)
            if os.path.exists(path):
                return path
        others = sorted(name for name in os.listdir(self.dataset_dir) if name.lower().endswith(".json"))
        found = f" ({', '.join(others[:5])} is not the file with the split)" if others else ""
        raise DatasetError(
            f"The annotation file {os.path.join(self.dataset_dir, wanted)} does not exist{found}: {tree}; {self.source}."
        )

    def _read_records(self) -> None:
        """Check every record and sort it into its split: train, test, and anything else is val, as released."""
        self._train: list[Record] = []
        self._test: list[Record] = []
        self._val: list[Record] = []
        splits = {"train": self._train, "test": self._test}
        self.unknown_splits: Counter[str] = Counter()
        for record in iter_records(self.anno_path, "captions"):
            name = record.text("split")
            splits.get(name, self._val).append(record)
            if name not in ("train", "test", "val"):
                self.unknown_splits[name] += 1
            record.texts("captions")
        for name, count in self.unknown_splits.items():
            logger.warning(
                "%s: %d records have the split %r, which is neither train, test nor val: they count as val",
                self.anno_path,
                count,
                name,
            )

    def _training_samples(self) -> tuple[list[TrainSample], set[int]]:
        folder = Folder(self.img_dir)
        pids = [record.integer("id") - self.first_train_id for record in self._train]
        known = sorted(set(pids))
        if known != list(range(len(known))):
            logger.warning("%s: the training ids are not consecutive; renumbered in sorted order", self.anno_path)
            renumbered = {pid: index for index, pid in enumerate(known)}
            pids = [renumbered[pid] for pid in pids]
        samples = []
        for image_id, (pid, record) in enumerate(zip(pids, self._train)):
            path = record.path(self.path_key, folder)
            samples += [(pid, image_id, path, caption) for caption in record.fields["captions"]]
        return samples, set(pids)

    def _evaluation_split(self, records: list[Record]) -> tuple[EvalSplit, set[int]]:
        folder = Folder(self.img_dir)
        split: EvalSplit = {"image_pids": [], "img_paths": [], "caption_pids": [], "captions": []}
        for record in records:
            pid, captions = record.integer("id"), record.fields["captions"]
            split["image_pids"].append(pid)
            split["img_paths"].append(record.path(self.path_key, folder))
            split["caption_pids"].extend([pid] * len(captions))
            split["captions"].extend(captions)
        return split, set(split["image_pids"])


class CUHKPEDES(RawDataset):
    """CUHK-PEDES (Li et al., "Person Search with Natural Language Description", CVPR 2017); ids start at 1."""

    name = "CUHK-PEDES"
    annotation_names = ("reid_raw.json",)
    first_train_id = 1
    image_tree = "{cam_a,cam_b,CUHK01,CUHK03,Market,test_query,train_query}/"
    source = (
        "CUHK-PEDES with its reid_raw.json is given for academic use on request from a university address, "
        "see ShuangLI59/Person-Search-with-Natural-Language-Description on GitHub"
    )


class ICFGPEDES(RawDataset):
    """ICFG-PEDES (Ding et al., SSAN, 2021); the image folders train and test are those of MSMT17, not the split."""

    name = "ICFG-PEDES"
    annotation_names = ("ICFG-PEDES.json", "ICFG_PEDES.json")
    image_tree = "{train,test}/"
    source = "ICFG-PEDES is given on request, see zifyloo/SSAN on GitHub"


class RSTPReid(RawDataset):
    """RSTPReid (Zhu et al., DSSL, 2021): five images per person, two captions each."""

    name = "RSTPReid"
    annotation_names = ("data_captions.json",)
    path_key = "img_path"
    image_tree = ""
    source = "RSTPReid is public, see NjtechCVLab/RSTPReid-Dataset on GitHub"


DATASETS: dict[str, type[RawDataset]] = {dataset.name: dataset for dataset in (CUHKPEDES, ICFGPEDES, RSTPReid)}

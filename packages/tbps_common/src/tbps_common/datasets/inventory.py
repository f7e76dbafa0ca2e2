"""What each data set holds, gathered through its reader, and the sizes it has according to its paper and release."""

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from pathlib import Path

from tbps_common.datasets.chatpedes import read_chatpedes
from tbps_common.datasets.finetune import (
    FINETUNE_IMAGES,
    FINETUNE_PREFIX,
    FINETUNE_SPLITS,
    load_processed_eval,
    load_processed_train,
)
from tbps_common.datasets.itcpr import ITCPR
from tbps_common.datasets.json_records import iter_records
from tbps_common.datasets.mals import SHARDS as MALS_SHARDS
from tbps_common.datasets.mals import load_mals
from tbps_common.datasets.raw import DATASETS
from tbps_common.datasets.sda import SHARDS as SDA_SHARDS
from tbps_common.datasets.sda import load_sda
from tbps_common.datasets.syncpr import load_syncpr
from tbps_common.errors import DatasetError


@dataclass(frozen=True)
class Size:
    """A published number; `step` is the place it was rounded to ("1.15 M" has step 10,000)."""

    value: int
    step: int = 1

    def fits(self, found: int) -> bool:
        return 2 * abs(found - self.value) <= self.step if self.step > 1 else found == self.value

    def __str__(self) -> str:
        return f"{'~' if self.step > 1 else ''}{self.value:,}"


Sizes = dict[str, tuple[Size | None, ...]]


def _exactly(*values: int | None) -> tuple[Size | None, ...]:
    return tuple(None if value is None else Size(value) for value in values)


# ids, images, captions
_CUHK: Sizes = {
    "train": _exactly(11_003, 34_054, 68_126),
    "val": _exactly(1_000, 3_078, 6_158),
    "test": _exactly(1_000, 3_074, 6_156),
}
_ICFG: Sizes = {"train": _exactly(3_102, 34_674, 34_674), "test": _exactly(1_000, 19_848, 19_848)}
_RSTP: Sizes = {
    "train": _exactly(3_701, 18_505, 37_010),
    "val": _exactly(200, 1_000, 2_000),
    "test": _exactly(200, 1_000, 2_000),
}

PUBLISHED: dict[str, Sizes] = {
    "CUHK-PEDES": {**_CUHK, "all": _exactly(13_003, 40_206, None)},
    "ICFG-PEDES": {**_ICFG, "val": _exactly(0, 0, 0), "all": _exactly(4_102, 54_522, 54_522)},
    "RSTPReid": {**_RSTP, "all": _exactly(4_101, 20_505, 41_010)},
    "finetune": {
        f"{prefix} {split}": sizes
        for prefix, splits in (("cuhk", _CUHK), ("icfg", _ICFG), ("rstp", _RSTP))
        for split, sizes in splits.items()
    },
    "SDA": {"train": _exactly(1_217_750)},  # pairs
    "SynCPR": {"train": (Size(1_150_000, 10_000), Size(177_000, 1_000))},  # triplets, groups
    # items, person ids
    "ITCPR": {
        "query": _exactly(2_202),
        "gallery": _exactly(20_510),
        "query-target pairs": _exactly(2_225),
        "query Celeb-reID": _exactly(1_151, 512),
        "query PRCC": _exactly(146, 146),
        "query LAST": _exactly(905, 541),
    },
    "ChatPedes": {},
    "MALS": {"train": _exactly(1_510_330)},  # pairs
}


@dataclass
class Inventory:
    """Sizes, captions and images of a data set, ready to be checked.

    Attributes:
        columns: what is counted.
        sizes: counts per subset, in the order of `columns`.
        captions: every text a model would read.
        images: distinct image paths with the folder each must lie in.
        problems: sentences; each makes the data unusable.
        counts: further findings that do not.
    """

    columns: tuple[str, ...]
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    captions: list[str] = field(default_factory=list)
    images: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def add_images(self, paths: Iterable[str], folder: str | os.PathLike[str]) -> None:
        self.images.update(dict.fromkeys(paths, os.fspath(folder)))

    def forbid_shared_ids(self, name: str, ids: dict[str, set[str]]) -> None:
        """A person in two splits would make the test measure memory."""
        for first, second in combinations(ids, 2):
            shared = sorted(ids[first] & ids[second])
            if shared:
                examples = ", ".join(shared[:5])
                self.problems.append(
                    f"{name}: {len(shared)} person ids are in {first} and in {second} (for example {examples})."
                )


def _raw(name: str, root: Path) -> Inventory:
    dataset = DATASETS[name](root, verbose=False)
    inventory = Inventory(("ids", "images", "captions"))
    rows = {subset: tuple(counts) for subset, *counts in dataset.sizes()}
    annotations = {"train": dataset.train_annos, "val": dataset.val_annos, "test": dataset.test_annos}
    ids = {split: {str(int(record["id"])) for record in records} for split, records in annotations.items()}
    inventory.sizes = {split: rows[split] for split in ("train", "val", "test")}
    inventory.sizes["all"] = (
        len(set.union(*ids.values())),
        *(sum(row[i] for row in rows.values()) for i in (1, 2)),
    )
    inventory.forbid_shared_ids(name, ids)
    inventory.captions = [caption for *_, caption in dataset.train]
    inventory.add_images([path for _, _, path, _ in dataset.train], dataset.img_dir)
    for split in (dataset.val, dataset.test):
        inventory.captions += split["captions"]
        inventory.add_images(split["img_paths"], dataset.img_dir)
    without = sum(not record["captions"] for records in annotations.values() for record in records)
    inventory.counts["images without caption"] = without
    for split, count in dataset.unknown_splits.items():
        inventory.counts[f"records with the split {split!r}, counted as val"] = count
    for split, use in (("train", "train on"), ("test", "test on")):
        if inventory.images and not annotations[split]:
            inventory.problems.append(f"{dataset.anno_path} has no record of the split {split}: nothing to {use}.")
    return inventory


def _finetune(root: Path) -> Inventory:
    inventory = Inventory(("ids", "images", "captions"))
    folder = root / "data" / "finetune"
    for name, prefix in FINETUNE_PREFIX.items():
        files = {split: folder / f"{prefix}_{split}.json" for split in FINETUNE_SPLITS[name]}
        absent = [file for file in files.values() if not file.exists()]
        if len(absent) == len(files):
            continue
        inventory.problems += [f"{file} does not exist, although other files of {name} do." for file in absent]
        image_root, ids = root / "images" / FINETUNE_IMAGES[name], {}
        for split, file in files.items():
            if file in absent:
                continue
            data = load_processed_train(file, image_root) if split == "train" else load_processed_eval(file, image_root)
            ids[split] = {str(record.identity("image_id")) for record in iter_records(file)}
            inventory.sizes[f"{prefix} {split}"] = (len(ids[split]), len(set(data.image_paths)), len(data.captions))
            inventory.captions += data.captions
            inventory.add_images(data.image_paths, image_root)
        inventory.forbid_shared_ids(name, ids)
    if not inventory.sizes:
        raise DatasetError(
            f"{folder} holds none of the files {{cuhk,icfg,rstp}}_{{train,val,test}}.json; "
            "`tbps-data convert` makes them from the raw annotations."
        )
    return inventory


def _sda(root: Path) -> Inventory:
    folder, image_root = root / "data" / "sda", root / "images" / "SDA"
    inventory = Inventory(("pairs", "image ids", "regions", "phrases"))
    data = load_sda(_shards(folder, SDA_SHARDS, inventory), image_root)
    regions = sum(len(record.boxes) for record in data.records)
    inventory.sizes["train"] = (len(data.records), data.n_images, regions, data.n_labels - data.n_images)
    inventory.captions = list(data.records.captions)
    inventory.add_images(data.records.image_paths, image_root)
    inventory.counts["pairs without region"] = sum(not record.boxes for record in data.records)
    inventory.counts["regions without area"] = sum(
        width <= 0 or height <= 0 for record in data.records for _, _, width, height in record.boxes
    )
    return inventory


def _syncpr(root: Path) -> Inventory:
    folder = _folder_with(root, "SynCPR", "SynCPR.json")
    triplets = load_syncpr(folder)
    inventory = Inventory(("triplets", "groups", "images"))
    inventory.add_images(triplets.reference_image_paths, folder)
    inventory.add_images(triplets.target_image_paths, folder)
    inventory.sizes["train"] = (len(triplets), len(set(triplets.cpr_ids)), len(inventory.images))
    inventory.captions = list(triplets.edit_captions)
    return inventory


def _itcpr(root: Path) -> Inventory:
    data = ITCPR(_folder_with(root, "ITCPR", "query.json", os.path.join("datasets", "query.json")), verbose=False)
    inventory = Inventory(("items", "person ids"))
    query, gallery = data.query, data.gallery
    targets = Counter(instance for instance in gallery["instance_ids"] if instance >= 0)
    positives = [targets[instance] for instance in query["instance_ids"]]
    sources = [Path(path).relative_to(data.data_dir).parts[0] for path in query["img_paths"]]
    people = list(zip(sources, query["person_ids"]))
    inventory.sizes["query"] = (len(people), len(set(people)))
    gallery_sources = [Path(path).relative_to(data.data_dir).parts[0] for path in gallery["img_paths"]]
    inventory.sizes["gallery"] = (len(gallery_sources), len(set(zip(gallery_sources, gallery["person_ids"]))))
    inventory.sizes["query-target pairs"] = (sum(positives), len({p for p, n in zip(people, positives) if n}))
    for source in dict.fromkeys(sources):
        of_source = [person for person in people if person[0] == source]
        inventory.sizes[f"query {source}"] = (len(of_source), len(set(of_source)))
    if not all(positives):
        inventory.problems.append(f"ITCPR: {positives.count(0)} queries have no gallery image of their instance id.")
    inventory.captions = query["captions"]
    inventory.add_images(query["img_paths"] + gallery["img_paths"], data.data_dir)
    return inventory


def _chatpedes(root: Path) -> Inventory:
    folder = _folder_with(root, "ChatPedes", "train_reid.json", "test_reid.json")
    image_root = folder / "imgs"
    if not image_root.is_dir() and (folder / "imgs00").is_dir():
        image_root = folder / "imgs00"
    inventory = Inventory(("ids", "images", "dialogues", "turns"))
    ids: dict[str, set[str]] = {}
    for split in ("train", "test"):
        ids[split], paths, dialogues, turns, without = set(), set(), 0, 0, 0
        for image in read_chatpedes(folder / f"{split}_reid.json", image_root):
            ids[split].add(str(image.identity))
            without += not image.dialogues
            if image.dialogues:
                paths.add(image.image_path)
            for dialogue in image.dialogues:
                dialogues, turns = dialogues + 1, turns + len(dialogue)
                inventory.captions += [message["value"] for turn in dialogue for message in turn]
        inventory.sizes[split] = (len(ids[split]), len(paths), dialogues, turns)
        inventory.counts[f"{split} records without dialogue"] = without
        inventory.add_images(paths, image_root)
    inventory.forbid_shared_ids("ChatPedes", ids)
    return inventory


def _mals(root: Path) -> Inventory:
    folder = _folder_with(root, "MALS", "gene_attrs")
    inventory = Inventory(("pairs", "image ids"))
    records = load_mals(_shards(folder / "gene_attrs", MALS_SHARDS, inventory), folder)
    inventory.sizes["train"] = (len(records), len(set(records.labels)))
    inventory.captions = list(records.captions)
    inventory.add_images(records.image_paths, folder)
    return inventory


def _folder_with(root: Path, name: str, *markers: str) -> Path:
    """`root/name` or `root` itself, whichever holds one of the files; `root/name` for the error message if none does."""
    for folder in (root / name, root):
        if any((folder / marker).exists() for marker in markers):
            return folder
    return root / name


def _shards(folder: Path, names: tuple[str, ...], inventory: Inventory) -> list[Path]:
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        raise DatasetError(f"{folder} holds none of the {len(names)} annotation files {names[0]} ... {names[-1]}.")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        inventory.problems.append(
            f"{len(absent)} of {len(names)} annotation files are missing in {folder}: {', '.join(absent[:5])}"
            f"{' ...' if len(absent) > 5 else ''}."
        )
    return present


INVENTORIES: dict[str, Callable[[Path], Inventory]] = {
    **{name: partial(_raw, name) for name in DATASETS},
    "finetune": _finetune,
    "SDA": _sda,
    "SynCPR": _syncpr,
    "ITCPR": _itcpr,
    "ChatPedes": _chatpedes,
    "MALS": _mals,
}

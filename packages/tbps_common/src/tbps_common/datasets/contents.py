"""What each data set holds, gathered through its reader: the part of a check that differs between data sets."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tbps_common.datasets.chatpedes import load_chatpedes
from tbps_common.datasets.convert import FINETUNE_IMAGES, FINETUNE_PREFIX, FINETUNE_SPLITS
from tbps_common.datasets.itcpr import ITCPR
from tbps_common.datasets.mals import SHARDS as MALS_SHARDS
from tbps_common.datasets.mals import load_mals
from tbps_common.datasets.processed import load_processed_eval, load_processed_train
from tbps_common.datasets.raw import DATASETS
from tbps_common.datasets.records import iter_records
from tbps_common.datasets.sda import SHARDS as SDA_SHARDS
from tbps_common.datasets.sda import load_sda
from tbps_common.datasets.syncpr import load_syncpr
from tbps_common.errors import DatasetError


@dataclass
class Contents:
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

    def add_images(self, paths: list[str], folder: str | os.PathLike[str]) -> None:
        self.images.update(dict.fromkeys(paths, os.fspath(folder)))

    def forbid_shared_ids(self, name: str, ids: dict[str, set[str]]) -> None:
        """A person in two splits would make the test measure memory."""
        splits = list(ids)
        for index, first in enumerate(splits):
            for second in splits[index + 1 :]:
                shared = sorted(ids[first] & ids[second])
                if shared:
                    examples = ", ".join(shared[:5])
                    self.problems.append(
                        f"{name}: {len(shared)} person ids are in {first} and in {second} (for example {examples})."
                    )


def read_contents(name: str, root: str | os.PathLike[str]) -> Contents:
    """Load a data set by its reader.

    Args:
        name: key of `CONTENTS`.
        root: the folder given to the user's commands.

    Raises:
        DatasetError: a file or record cannot be used.
    """
    contents = CONTENTS[name](Path(root))
    if not contents.images:
        contents.problems.append(f"{name} in {os.fspath(root)} holds no record.")
    return contents


def _raw(name: str) -> Callable[[Path], Contents]:
    def read(root: Path) -> Contents:
        dataset = DATASETS[name](root, verbose=False)
        contents = Contents(("ids", "images", "captions"))
        rows = {subset: tuple(counts) for subset, *counts in dataset.sizes()}
        annotations = {"train": dataset.train_annos, "val": dataset.val_annos, "test": dataset.test_annos}
        ids = {split: {str(int(record["id"])) for record in records} for split, records in annotations.items()}
        contents.sizes = {split: rows[split] for split in ("train", "val", "test")}
        contents.sizes["all"] = (len(set.union(*ids.values())), *(sum(row[i] for row in rows.values()) for i in (1, 2)))
        contents.forbid_shared_ids(name, ids)
        contents.captions = [caption for *_, caption in dataset.train]
        contents.add_images([path for _, _, path, _ in dataset.train], dataset.img_dir)
        for split in (dataset.val, dataset.test):
            contents.captions += split["captions"]
            contents.add_images(split["img_paths"], dataset.img_dir)
        without = sum(not record["captions"] for records in annotations.values() for record in records)
        contents.counts["images without caption"] = without
        return contents

    return read


def _finetune(root: Path) -> Contents:
    contents = Contents(("ids", "images", "captions"))
    folder = root / "data" / "finetune"
    for name, prefix in FINETUNE_PREFIX.items():
        files = {split: folder / f"{prefix}_{split}.json" for split in FINETUNE_SPLITS[name]}
        absent = [file for file in files.values() if not file.exists()]
        if len(absent) == len(files):
            continue
        contents.problems += [f"{file} does not exist, although other files of {name} do." for file in absent]
        image_root, ids = root / "images" / FINETUNE_IMAGES[name], {}
        for split, file in files.items():
            if file in absent:
                continue
            data = load_processed_train(file, image_root) if split == "train" else load_processed_eval(file, image_root)
            ids[split] = {str(record.identity("image_id")) for record in iter_records(file)}
            contents.sizes[f"{prefix} {split}"] = (len(ids[split]), len(set(data.image_paths)), len(data.captions))
            contents.captions += data.captions
            contents.add_images(data.image_paths, image_root)
        contents.forbid_shared_ids(name, ids)
    if not contents.sizes:
        raise DatasetError(
            f"{folder} holds none of the files {{cuhk,icfg,rstp}}_{{train,val,test}}.json; "
            "`tbps-data convert` makes them from the raw annotations."
        )
    return contents


def _sda(root: Path) -> Contents:
    folder, image_root = root / "data" / "sda", root / "images" / "SDA"
    contents = Contents(("pairs", "image ids", "regions", "phrases"))
    data = load_sda(_shards(folder, SDA_SHARDS, contents), image_root)
    regions = sum(len(record.boxes) for record in data.records)
    contents.sizes["train"] = (len(data.records), data.n_images, regions, data.n_labels - data.n_images)
    contents.captions = [record.caption for record in data.records]
    contents.add_images([record.image_path for record in data.records], image_root)
    contents.counts["pairs without region"] = sum(not record.boxes for record in data.records)
    contents.counts["regions without area"] = sum(
        width <= 0 or height <= 0 for record in data.records for _, _, width, height in record.boxes
    )
    return contents


def _syncpr(root: Path) -> Contents:
    folder = _folder_with(root, "SynCPR", "SynCPR.json")
    triplets = load_syncpr(folder)
    contents = Contents(("triplets", "groups", "images"))
    for triplet in triplets:
        contents.add_images([triplet.reference_image_path, triplet.target_image_path], folder)
    groups = {triplet.cpr_id for triplet in triplets}
    contents.sizes["train"] = (len(triplets), len(groups), len(contents.images))
    contents.captions = [triplet.edit_caption for triplet in triplets]
    return contents


def _itcpr(root: Path) -> Contents:
    data = ITCPR(_folder_with(root, "ITCPR", "query.json", os.path.join("datasets", "query.json")), verbose=False)
    contents = Contents(("items", "person ids"))
    query, gallery = data.query, data.gallery
    targets: dict[int, int] = {}
    for instance in gallery["instance_ids"]:
        targets[instance] = targets.get(instance, 0) + 1
    positives = [targets.get(instance, 0) if instance >= 0 else 0 for instance in query["instance_ids"]]
    sources = [Path(path).relative_to(data.data_dir).parts[0] for path in query["img_paths"]]
    people = list(zip(sources, query["person_ids"]))
    contents.sizes["query"] = (len(people), len(set(people)))
    gallery_sources = [Path(path).relative_to(data.data_dir).parts[0] for path in gallery["img_paths"]]
    contents.sizes["gallery"] = (len(gallery_sources), len(set(zip(gallery_sources, gallery["person_ids"]))))
    contents.sizes["query-target pairs"] = (sum(positives), len({p for p, n in zip(people, positives) if n}))
    for source in dict.fromkeys(sources):
        of_source = [person for person in people if person[0] == source]
        contents.sizes[f"query {source}"] = (len(of_source), len(set(of_source)))
    if not all(positives):
        contents.problems.append(f"ITCPR: {positives.count(0)} queries have no gallery image of their instance id.")
    contents.captions = query["captions"]
    contents.add_images(query["img_paths"] + gallery["img_paths"], data.data_dir)
    return contents


def _chatpedes(root: Path) -> Contents:
    folder = _folder_with(root, "ChatPedes", "train_reid.json", "test_reid.json")
    image_root = folder / "imgs"
    if not image_root.is_dir() and (folder / "imgs00").is_dir():
        image_root = folder / "imgs00"
    contents = Contents(("ids", "images", "dialogues", "turns"))
    ids = {}
    for split in ("train", "test"):
        file = folder / f"{split}_reid.json"
        dialogues = load_chatpedes(file, image_root)
        names = [(str(record.identity("id")), bool(record.fields["chats"])) for record in iter_records(file)]
        ids[split] = {name for name, _ in names}
        images = [dialogue.image_path for dialogue in dialogues]
        turns = sum(len(dialogue.turns) for dialogue in dialogues)
        contents.sizes[split] = (len(ids[split]), len(set(images)), len(dialogues), turns)
        contents.counts[f"{split} records without dialogue"] = sum(not chats for _, chats in names)
        contents.captions += [message["value"] for chat in dialogues for turn in chat.turns for message in turn]
        contents.add_images(images, image_root)
    contents.forbid_shared_ids("ChatPedes", ids)
    return contents


def _mals(root: Path) -> Contents:
    folder = _folder_with(root, "MALS", "gene_attrs")
    contents = Contents(("pairs", "image ids"))
    records = load_mals(_shards(folder / "gene_attrs", MALS_SHARDS, contents), folder)
    contents.sizes["train"] = (len(records), len({record.label for record in records}))
    contents.captions = [record.caption for record in records]
    contents.add_images([record.image_path for record in records], folder)
    return contents


def _folder_with(root: Path, name: str, *markers: str) -> Path:
    """`root/name` or `root` itself, whichever holds one of the files; `root/name` for the error message if none does."""
    for folder in (root / name, root):
        if any((folder / marker).exists() for marker in markers):
            return folder
    return root / name


def _shards(folder: Path, names: tuple[str, ...], contents: Contents) -> list[Path]:
    present = [folder / name for name in names if (folder / name).exists()]
    if not present:
        raise DatasetError(f"{folder} holds none of the {len(names)} annotation files {names[0]} ... {names[-1]}.")
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        contents.problems.append(
            f"{len(absent)} of {len(names)} annotation files are missing in {folder}: {', '.join(absent[:5])}"
            f"{' ...' if len(absent) > 5 else ''}."
        )
    return present


CONTENTS: dict[str, Callable[[Path], Contents]] = {
    **{name: _raw(name) for name in DATASETS},
    "finetune": _finetune,
    "SDA": _sda,
    "SynCPR": _syncpr,
    "ITCPR": _itcpr,
    "ChatPedes": _chatpedes,
    "MALS": _mals,
}

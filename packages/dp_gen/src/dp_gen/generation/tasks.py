"""What is to be generated: one task per output image, planned before any model is loaded."""

import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dp_gen import IMAGE_TOKEN
from dp_gen.data.layout import FolderLayout
from dp_gen.data.references import REFERENCE_SUFFIXES, natural_sort
from dp_gen.generation.references import Reference, rewrite
from tbps_common.datasets import Folder
from tbps_common.errors import DatasetError, InputError
from tbps_common.pipeline.journal import read_json_lines
from tbps_common.run.batches import item_seed


@dataclass(frozen=True)
class NewTask:
    """A person that does not exist yet.

    Attributes:
        description: with image tokens.
        references: one file per image token, in order.
        seed: of its noise.
        name: output file, relative to the output folder.
        number: of the description.
    """

    description: str
    references: tuple[Path, ...] = ()
    seed: int = 0
    name: str = "output_0.png"
    number: int = 0


@dataclass(frozen=True)
class EditTask:
    """An image of a training folder with some attributes replaced.

    Attributes:
        name: output file, relative to the output folder.
        seed: of its noise.
        sample: id in the folder.
        index: its place in the split.
        caption: that the model sees, without image tokens.
        original: its caption in the folder.
        segments: those with a reference, at most the model's slots, by their ends in `caption`.
        edited: new reference of each edited label.
    """

    name: str
    seed: int
    sample: str
    index: int
    caption: str
    original: str
    segments: tuple[Mapping[str, Any], ...]
    edited: Mapping[str, Reference] = field(repr=False)


def new_tasks(descriptions: Sequence[tuple[str, tuple[Path, ...]]], copies: int, seed: int) -> list[NewTask]:
    """`copies` images of each description: output_0.png, output_1.png, ... with the description outermost."""
    return [
        NewTask(text, references, item_seed(seed, number, copy), f"output_{number * copies + copy}.png", number)
        for number, (text, references) in enumerate(descriptions)
        for copy in range(copies)
    ]


def read_descriptions(path: str) -> list[tuple[str, tuple[Path, ...]]]:
    """Lines `{"description": "... <|image|> ...", "references": ["file", ...]}`; files start in the list's folder.

    Raises:
        DatasetError: a line cannot be used.
    """
    folder = Folder(Path(path).parent)
    found = []
    for number, row in read_json_lines(path):
        where = f"{path}:{number + 1}"
        if isinstance(row, str):
            raise DatasetError(f"{where}: {row}")
        text, files = row.get("description"), row.get("references", [])
        if not isinstance(text, str) or not isinstance(files, list) or not all(isinstance(f, str) for f in files):
            raise DatasetError(f'{where}: expected {{"description": text, "references": [file, ...]}}')
        for file in files:
            problem = folder.problem(file)
            if problem is not None:
                raise DatasetError(f"{where}: the file {file!r} {problem}")
        references = tuple(Path(folder.join(file)) for file in files)
        missing = [file for file in references if not file.is_file()]
        if missing:
            raise DatasetError(f"{where}: the reference {missing[0]} does not exist")
        found.append((text, references))
    if not found:
        raise DatasetError(f"{path} holds no descriptions: write one JSON object per line")
    return found


def one_description(text: str, folder: str | None) -> list[tuple[str, tuple[Path, ...]]]:
    """The description of `--test_description` with the references of `--test_reference_attribute_folder`.

    Raises:
        DatasetError: the folder has no usable references.
    """
    if folder is None:
        return [(text, ())]
    root = Path(folder)
    if not root.is_dir():
        raise DatasetError(f"--test_reference_attribute_folder {root} is not a folder: name the folder of references")
    subfolders = natural_sort(path for path in root.iterdir() if path.is_dir())
    if not subfolders:
        return [(text, tuple(natural_sort(_images(root))))]
    files = []
    for subfolder in subfolders:
        images = sorted(_images(subfolder))
        if not images:
            raise DatasetError(f"{subfolder} holds no image ({', '.join(REFERENCE_SUFFIXES)}): add the reference image")
        files.append(images[0])
    return [(text, tuple(files))]


def check_descriptions(descriptions: Sequence[tuple[str, tuple[Path, ...]]], slots: int | None) -> None:
    """As many references as image tokens, and no more than the model takes.

    Raises:
        InputError: a description breaks this.
    """
    for text, references in descriptions:
        tokens = text.count(IMAGE_TOKEN)
        if tokens != len(references):
            raise InputError(
                f"{text!r} has {tokens} image tokens {IMAGE_TOKEN} and {len(references)} reference images: the "
                "numbers must be equal (first token, first reference)"
            )
        if slots is not None and tokens > slots:
            raise InputError(f"{text!r} has {tokens} image tokens, and the model takes {slots} references at most")


@dataclass(frozen=True)
class EditPlan:
    """How a training folder is edited.

    Attributes:
        labels: attribute types to replace, where an image has them.
        pool: references to draw from.
        copies: edits per sample.
        slots: references that the model takes.
        seed: of all draws.
        substitute: write the references' phrases into the caption that the model sees.
        limit: samples, at most.
    """

    labels: tuple[str, ...]
    pool: Mapping[str, Sequence[Reference]]
    copies: int
    slots: int
    seed: int
    substitute: bool
    limit: int | None


def edit_tasks(folder: FolderLayout, plan: EditPlan) -> tuple[list[EditTask], int]:
    """Tasks for the samples that have something to replace, and how many samples have not.

    Raises:
        DatasetError: a sample's JSON file cannot be used.
    """
    tasks: list[EditTask] = []
    without = 0
    for index, sample in enumerate(folder.ids[: plan.limit]):
        info = folder.read_info(sample)
        segments = list(_distinct_ends(info["segments"]))
        labels = [label for label in plan.labels if any(segment["label"] == label for segment in segments)]
        if not labels:
            without += 1
            continue
        tasks += [_edit_task(plan, sample, index, info, segments, labels, copy) for copy in range(plan.copies)]
    return tasks, without


def _edit_task(
    plan: EditPlan,
    sample: str,
    index: int,
    info: Mapping[str, Any],
    segments: list[Mapping[str, Any]],
    labels: list[str],
    copy: int,
) -> EditTask:
    # Seeded by the id's text, so that a shorter list of ids gives the same images for the ids it has.
    seed = item_seed(plan.seed, zlib.crc32(sample.encode()), copy)
    draw = random.Random(seed)
    edited = {label: draw.choice(plan.pool[label]) for label in labels[: plan.slots]}
    # The edited attributes come first if there are more than slots; the others keep what the image shows.
    kept = sorted(segments, key=lambda segment: segment["label"] not in edited)[: plan.slots]
    kept.sort(key=lambda segment: segment["end"])
    caption = info["description"]
    if plan.substitute:
        caption, kept = rewrite(caption, kept, {label: one.phrase for label, one in edited.items()})
    return EditTask(f"imgs/{sample}_{copy}.jpg", seed, sample, index, caption, info["description"], tuple(kept), edited)


def _distinct_ends(segments: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Segments whose phrases end at different places: one image token cannot stand for two references."""
    ends: set[int] = set()
    for segment in segments:
        if segment["end"] not in ends and segment["end"] > 0:
            ends.add(segment["end"])
            yield segment


def _images(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in REFERENCE_SUFFIXES and path.is_file()]

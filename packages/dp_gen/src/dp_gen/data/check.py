"""Checking a whole training folder before a long run."""

import argparse
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dp_gen.data.folder import TrainingFolder
from dp_gen.data.layout import SPLIT_FILES
from tbps_common.errors import DatasetError
from tbps_common.run.command import command

_SHOWN = 10


@dataclass
class FolderReport:
    """What `check_dataset` found.

    Attributes:
        samples: number of ids.
        labels: segments by label.
        problems: one sentence each; empty for a folder that can be trained on.
    """

    samples: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def check_dataset(root: str | os.PathLike[str], split: str = "all", *, show: bool = False) -> FolderReport:
    """Read every file of a split, and compare the files of each sample with each other.

    Args:
        root: of the training folder.
        split: `train`, `test` or `all`.
        show: with a progress bar.

    Raises:
        DatasetError: the folder or its id file cannot be used at all.
    """
    folder = TrainingFolder(root, split)
    report = FolderReport(samples=len(folder))
    for index in tqdm(range(len(folder)), desc="checking", unit="sample", disable=not show):
        try:
            image, info, seg_map, _ = folder.load(index)
        except DatasetError as error:
            report.problems.append(str(error))
            continue
        path = Path(f"{folder.stem(folder.ids[index])}.json")
        present = set(np.unique(seg_map.numpy()).tolist())
        ends: set[int] = set()
        for number, segment in enumerate(info["segments"]):
            report.labels[segment["label"] or "(no label)"] += 1
            for problem in _segment_problems(segment, info["description"], present, tuple(image.shape[1:]), ends):
                report.problems.append(f"{path}, segment {number}: {problem}")
            ends.add(segment["end"])
    return report


def _segment_problems(
    segment: dict[str, object], text: str, present: set[int], size: tuple[int, ...], ends: set[int]
) -> list[str]:
    problems = []
    end, box, value = segment["end"], segment["bbox"], segment["id"]
    assert isinstance(end, int) and isinstance(box, list)
    if not 0 < end <= len(text):
        problems.append(f"'end' {end} is outside the description of {len(text)} characters")
    if end in ends:
        problems.append(f"another segment ends at {end} too: one image token cannot stand for both")
    if box[2] > size[1] or box[3] > size[0]:
        problems.append(f"'bbox' {box} leaves the image of {size[1]} x {size[0]} pixels")
    if value == 0:
        problems.append("'id' 0 is the background")
    elif value not in present:
        problems.append(f"'id' {value} does not occur in the mask")
    return problems


@command
def main(argv: list[str]) -> int:
    """Print counts and problems; status 1 if there are any."""
    parser = argparse.ArgumentParser(
        prog="python -m dp_gen.data",
        description="Check a training folder: all files there and readable, sizes equal, segment ids in the mask, boxes "
        "inside the image, phrase ends inside the description.",
    )
    parser.add_argument("root", metavar="ROOT", help="the training folder, as given to --dataset_name")
    parser.add_argument("--split", choices=tuple(SPLIT_FILES), default="all", help="ids to check (default: all)")
    args = parser.parse_args(argv)
    report = check_dataset(args.root, args.split, show=True)
    print(f"{report.samples} samples; segments: {', '.join(f'{n} {k}' for k, n in sorted(report.labels.items()))}")
    for problem in report.problems[:_SHOWN]:
        print(f"problem: {problem}")
    more = len(report.problems) - _SHOWN
    print(f"... and {more} more" if more > 0 else f"{len(report.problems)} problems")
    return 1 if report.problems else 0

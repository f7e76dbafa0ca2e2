"""The evaluation command: tables as released, and files that last (JSON, ranked lists, the curve over rounds)."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diana.options import parse_eval_flags
from tbps_common.errors import InputError

if TYPE_CHECKING:
    from diana.retrieval import Evaluation

COLUMNS = ("R1", "R5", "R10", "mAP", "mFR")
KEYS = {"R1": "r1", "R5": "r5", "R10": "r10", "mAP": "mAP", "mFR": "mfr"}
_STEPS = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Row:
    """One checkpoint evaluated at one turn limit."""

    pretrained: str
    steps: int | None
    dataset: str
    split: str
    evaluation: "Evaluation"
    fingerprint: str
    seconds: float

    @property
    def best_r1(self) -> float:
        return max(metrics["r1"] for metrics in self.evaluation.metrics.values())

    def as_json(self) -> dict[str, Any]:
        """The entry of metrics.json."""
        return {
            "pretrained": self.pretrained,
            "steps": self.steps,
            "dataset": self.dataset,
            "split": self.split,
            "turn_limit": self.evaluation.turn_limit,
            "num_images": self.evaluation.num_images,
            "num_queries": self.evaluation.num_queries,
            "num_skipped": self.evaluation.num_skipped,
            "metrics": {mode: dict(metrics) for mode, metrics in self.evaluation.metrics.items()},
        }


def main(argv: list[str]) -> int:
    """Parse, check the data, evaluate every checkpoint, report."""
    args = parse_eval_flags(argv)
    metas = check_evaluation(args)
    import torch

    from tbps_common.run.device import choose_device

    device = choose_device(args.device)
    torch.manual_seed(args.seed)
    rows: list[Row] = []
    models = sorted_checkpoints(args.pretrained)
    for number, pretrained in enumerate(models, start=1):
        print(f"Evaluate the {number}/{len(models)}-th model.", flush=True)
        for dataset in args.dataset:
            rows += _evaluate(args, pretrained, dataset, metas[dataset], device)
    print("Best metrics:")
    print(table(max(rows, key=lambda row: row.best_r1)))  # the first of equals
    if args.output_dir:
        from diana.evaluation_files import write_files

        for path in write_files(Path(args.output_dir), rows, args, metas):
            print(f"wrote {path}")
    return 0


def check_evaluation(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Check data and checkpoints without loading torch.

    Returns:
        Data set -> its entry of the YAML file, with `view`, the annotations read.

    Raises:
        InputError: a file, an image or a checkpoint is missing, or a checkpoint has no refiner and one is needed.
    """
    from diana.data.annotations import image_folder, load_annotations, load_dataset_config
    from diana.model.config import DiaNAConfig
    from diana.model.folders import resolve_folder
    from tbps_common.images import check_images_exist

    output = Path(args.output_dir) if args.output_dir else None
    if output is not None and output.exists() and not output.is_dir():
        raise InputError(f"--output_dir {output} is a file: give a folder")
    metas = {}
    for dataset in args.dataset:
        meta = load_dataset_config(args.dataset_config_path, dataset)
        meta["view"] = load_annotations(meta, args.split)
        check_images_exist(meta["view"]["images"], image_folder(meta), flag="DIANA_DATA_ROOT")
        metas[dataset] = meta
    for pretrained in args.pretrained:
        config = DiaNAConfig.from_file(resolve_folder(pretrained) / "config.json")
        if args.mode != "global" and not config.enable_refiner:
            raise InputError(
                f"--mode {args.mode} needs the attribute refiner, which {pretrained} does not have: use --mode global"
            )
    return metas


def sorted_checkpoints(folders: Sequence[str]) -> list[str]:
    """In the order given or, if the first is called `checkpoint-N`, by N."""
    if not _STEPS.search(folders[0]):
        return list(folders)
    return sorted(folders, key=lambda folder: steps_of(folder) or 0)


def steps_of(folder: str) -> int | None:
    """N of `checkpoint-N` in a path."""
    match = _STEPS.search(folder)
    return int(match[1]) if match else None


def _evaluate(args: argparse.Namespace, pretrained: str, dataset: str, meta: dict[str, Any], device: Any) -> list[Row]:
    import time

    import torch

    from diana.model import load_diana
    from diana.retrieval import evaluate
    from tbps_common.run.checkpoint import fingerprint

    dtype = {"checkpoint": None, "fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model, tokenizer = load_diana(pretrained, device=device, dtype=dtype)
    _announce(args.turn_limit[0], pretrained, meta["view"])
    started = time.perf_counter()
    results = evaluate(
        model,
        tokenizer,
        meta,
        split=args.split,
        turn_limits=args.turn_limit,
        mode=args.mode,
        batch_size=args.batch_size,
        text_batch_size=args.text_batch_size,
        max_seq_length=args.max_seq_length,
        num_workers=args.num_workers,
        sim_dtype=args.sim_dtype,
        progress=True,
    )
    seconds = time.perf_counter() - started
    mark = fingerprint(model.state_dict(), model.config.to_dict())
    rows = []
    for number, evaluation in enumerate(results):
        if number:
            _announce(evaluation.turn_limit, pretrained, meta["view"])
        row = Row(pretrained, steps_of(pretrained), dataset, args.split, evaluation, mark, seconds / len(results))
        print(table(row))
        print(flush=True)
        rows.append(row)
    return rows


def _announce(turn_limit: int, pretrained: str, view: dict[str, list[Any]]) -> None:
    print(f"Running evaluation under 'round={turn_limit}' with model '{pretrained}'.")
    print(f"There are {len(set(view['images']))} images.")
    print(f"There are {len(set(view['image_ids']))} ids.")
    print(f"There are {len(view['chats'])} captions.", flush=True)


def table(row: Row) -> Any:
    """The released table: one line per mode."""
    from prettytable import PrettyTable

    result = PrettyTable(["Steps", "Mode", *COLUMNS, "Time"])
    now = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    for mode, metrics in row.evaluation.metrics.items():
        values = (f"{metrics[KEYS[name]]:.2f}" for name in COLUMNS)
        result.add_row(["-" if row.steps is None else row.steps, mode, *values, now])
    return result

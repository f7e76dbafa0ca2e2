"""What a run prints and writes, in the released formats."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tbps_common.files import write_text
from tbps_common.run.checkpoint import save_checkpoint

METRICS = ("R1", "R5", "R10", "mAP", "mINP")
LOG_NAME = "log.txt"
BEST_NAME = "checkpoint_best.pth"


def log_line(epoch: int, metrics: Mapping[str, float], averages: Mapping[str, float]) -> str:
    """One line of log.txt: a JSON object whose values are all strings.

    Args:
        epoch: counted from 0.
        metrics: percentages.
        averages: meters of the training, in their order.
    """
    entry = {"epo": str(epoch), **{name: str(round(metrics[name], 3)) for name in METRICS}}
    entry |= {name: str(float(f"{value:.5f}")) for name, value in averages.items()}
    return json.dumps(entry)


def write_log(folder: Path, lines: Sequence[str], best_epoch: int | None = None) -> None:
    """Write log.txt; with `best_epoch` the run is over."""
    text = "".join(f"{line}\n" for line in lines)
    write_text(folder / LOG_NAME, text if best_epoch is None else f"{text}best epoch: {best_epoch}")


def epoch_table(lines: Sequence[str]) -> str:
    """Table of all epochs so far."""
    from prettytable import PrettyTable

    table = PrettyTable(["epoch", *METRICS])
    for line in lines:
        entry = json.loads(line)
        table.add_row([entry["epo"], *(f"{float(entry[name]):.3f}" for name in METRICS)])
    return str(table)


def save_weights(path: Path, model: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write a checkpoint in the released layout.

    Raises:
        OSError: the file cannot be written; an older one of that name is untouched.
    """
    save_checkpoint({"model": dict(model), "config": dict(config)}, path)

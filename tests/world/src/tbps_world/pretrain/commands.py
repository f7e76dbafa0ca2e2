"""`tbps-train-tiny`: start weights for the toys, each trained within minutes and kept."""

import argparse
import json
import shutil
import time
from importlib import import_module
from pathlib import Path

from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.run.arguments import HelpFormatter, whole_number

DESCRIPTION = """\
Train the tiny stand-ins for what the papers take from the web, on synthetic persons whom no toy draws. NAME/ holds the
files that the paper's flags read, and start.json: how they were trained and what was measured on persons left aside.
A model that is there, trained with the same settings, is kept.

  tbps-train-tiny clip
  cmlfa-toy --start build/start
"""
# Name -> the function train(folder, *, seed, steps) that fills the folder and returns what it measured. `steps` None:
# as many as are needed. Imported when its turn has come, for what one model needs another one may do without.
MODELS: dict[str, str] = {
    "clip": "tbps_world.pretrain.clip:train_clip",
    "blip2": "tbps_world.pretrain.blip2:train_blip2",
    "swin_bert": "tbps_world.pretrain.swin_bert:train",
    "swin_llama": "tbps_world.pretrain.swin_llama:train",
    "diffusion": "tbps_world.pretrain.diffusion:train",
    "image_encoder": "tbps_world.pretrain.image_encoder:train",
    "detector": "tbps_world.pretrain.detector:train",
    "pose": "tbps_world.pretrain.pose:train",
    "captioner": "tbps_world.pretrain.captioner:train",
}
NEEDS = {"blip2": "clip"}
"""Models that begin with another one, which lies beside them."""
RECORD = "start.json"
VERSION = 1
"""Raised whenever the same settings would train another model."""


def main(argv: list[str]) -> int:
    """Train the models that are not there."""
    flags = _parse(argv)
    unknown = [name for name in flags.names if name not in MODELS]
    if unknown:
        raise InputError(f"{unknown[0]} is not a start weight: choose from {', '.join(MODELS)}.")
    names = [one for name in flags.names for one in (NEEDS.get(name), name) if one]
    for name in dict.fromkeys(names):
        _train(name, Path(flags.out) / name, flags.seed, flags.steps)
    return 0


def _train(name: str, folder: Path, seed: int, steps: int | None) -> None:
    settings = {"name": name, "version": VERSION, "seed": seed, "steps": steps}
    record = _record(folder)
    if record is not None and record["settings"] == settings:
        print(f"{folder} is there: {_figures(record['figures'])}")
        return
    if folder.exists() and record is None:
        raise InputError(f"{folder} was not written by tbps-train-tiny: choose another --out, or remove it.")
    module, _, function = MODELS[name].partition(":")
    # What is unfinished has another name; a killed training's leftovers go when the next one begins.
    unfinished = folder.with_name(f".{name}-unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    started = time.perf_counter()
    try:
        figures = getattr(import_module(module), function)(unfinished, seed=seed, steps=steps)
        seconds = time.perf_counter() - started
        write_json(unfinished / RECORD, {"settings": settings, "figures": figures, "seconds": round(seconds, 1)})
        if folder.exists():
            shutil.rmtree(folder)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"written to {folder} in {seconds / 60:.1f} minutes: {_figures(figures)}")


def _record(folder: Path) -> dict | None:
    """What the folder's record says, None if there is none."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if {"settings", "figures"} <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None


def _figures(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items())


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tbps-train-tiny", description=DESCRIPTION, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("names", metavar="NAME", nargs="+", help=f"models to train: {', '.join(MODELS)}")
    parser.add_argument("--out", metavar="DIR", default="build/start", help="folder of the models' folders")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of weights and order")
    parser.add_argument("--steps", type=whole_number(1), help="training steps instead of the tuned number")
    return parser.parse_args(argv)

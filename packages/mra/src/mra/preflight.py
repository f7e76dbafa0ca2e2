"""Checks that need no model, made before torch is imported: a wrong path is reported within a second, not after minutes."""

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from mra.config import EvaluationSettings, TrainingSettings, check_config, check_task, evaluation_files, with_overrides
from mra.text.augmentation import comes_out_empty
from mra.text.vocabulary import read_vocabulary
from mra.text.wordnet import require_wordnet, synonyms_of
from tbps_common.datasets import ProcessedEval, ProcessedTrain, load_processed_eval, load_processed_train, load_sda
from tbps_common.datasets.sda import SDA
from tbps_common.errors import CheckpointError, DatasetError, InputError
from tbps_common.images import check_images_exist
from tbps_common.models.source import is_model

STATE_NAME = "last.pth"


@dataclass
class Annotation:
    """What the checks before a run have read: the training set, and the splits that are evaluated, by their name."""

    training: SDA | ProcessedTrain | None = None
    splits: dict[str, ProcessedEval] = field(default_factory=dict)


def check_run(config: dict[str, Any], config_file: str, args: argparse.Namespace, *, data: bool = True) -> Annotation:
    """Refuse a run that could not work.

    Args:
        config: as `load_config` returns it.
        config_file: how messages name it.
        args: flags of `run.py` or `Retrieval.py`.
        data: read the annotations and look for every image file, too.

    Returns:
        The annotations; without `data`, none.

    Raises:
        InputError: one sentence naming the flag, the file or the key, and the remedy.
    """
    check_task(args.task)
    training = not args.evaluate
    if not training and args.resume:
        raise InputError("--resume continues a training run, and --evaluate trains nothing: leave one of them out")
    config = with_overrides(config, args)
    settings = check_config(config, config_file, training=training)
    _check_split(config, config_file, args)
    _check_output(args)
    _check_weights(settings, config_file, args)
    _check_vocabulary(config, settings, config_file)
    if training and config.get("eda"):
        _check_synonyms(config)
    annotation = Annotation()
    if data:
        annotation.splits = _evaluated_splits(config, args)
        images: list[Sequence[str]] = [split.image_paths for split in annotation.splits.values()]
        if training:
            annotation.training, paths = _training_set(config)
            images.append(paths)
        root = ", ".join(dict.fromkeys(_image_roots(config)))
        check_images_exist(chain.from_iterable(images), root, flag=f"image_root in {config_file}")
    return annotation


def _check_split(config: dict[str, Any], config_file: str, args: argparse.Namespace) -> None:
    if not args.evaluate and args.select not in evaluation_files(config):
        raise InputError(
            f"--select {args.select} needs the key {args.select}_file, which {config_file} does not have (ICFG-PEDES has "
            "no validation split): use --select test"
        )


def _check_output(args: argparse.Namespace) -> None:
    folder = Path(args.output_dir)
    existing = next(parent for parent in (folder, *folder.parents, Path()) if parent.exists())
    if not existing.is_dir():
        raise InputError(f"--output_dir {folder} cannot be made: {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise InputError(f"--output_dir {folder} cannot be written: check the permissions of {existing.resolve()}")
    if args.resume and not (folder / STATE_NAME).is_file():
        raise CheckpointError(
            f"--resume found no {folder / STATE_NAME}: check --output_dir, or start the run without --resume"
        )


def _check_weights(settings: EvaluationSettings, config_file: str, args: argparse.Namespace) -> None:
    if args.resume:
        return  # everything comes from last.pth
    if args.evaluate or (isinstance(settings, TrainingSettings) and settings.load_pretrained):
        require_file(
            args.checkpoint, f"--checkpoint {args.checkpoint}", "give the weights to start from or to evaluate"
        )
        return
    if settings.load_params:
        weights = settings.vision.start_weights
        require_file(weights, f"{weights} (ckpt of vision_config)", "download the Swin weights named in the README")
    folder = Path(settings.text_encoder)
    if not any((folder / name).is_file() for name in ("model.safetensors", "pytorch_model.bin")):
        raise CheckpointError(
            f"{folder} (text_encoder in {config_file}) holds neither model.safetensors nor pytorch_model.bin: download "
            "bert-base-uncased, which the README names"
        )


def require_file(path: str, what: str, remedy: str) -> None:
    """Refuse weights that are not there.

    Raises:
        CheckpointError: `path` is neither a file nor a folder in the layout of the hub.
    """
    if not path or not is_model(path):
        raise CheckpointError(f"{what} is not a file: {remedy}")


def _check_vocabulary(config: dict[str, Any], settings: EvaluationSettings, config_file: str) -> None:
    words, known = len(read_vocabulary(config["text_encoder"])), settings.text.vocab_size
    if words > known:
        raise InputError(
            f"{config['text_encoder']}/vocab.txt holds {words} tokens, but vocab_size of text_config in {config_file} is "
            f"{known}: the two do not belong together"
        )


def _check_synonyms(config: dict[str, Any]) -> None:
    if synonyms_of(config) is None:
        require_wordnet()


def _image_roots(config: dict[str, Any]) -> list[str]:
    roots = [config["image_root"], config.get("image_root_test") or config["image_root"]]
    for key, root in zip(("image_root", "image_root_test"), roots):
        if not os.path.isdir(root):
            raise DatasetError(f"there is no folder {root} ({key}): unpack the images there, or run in another folder")
    for entry in config.get("train_file", []):
        if isinstance(entry, dict) and not os.path.isdir(entry.get("image_root") or config["image_root"]):
            raise DatasetError(
                f"there is no folder {entry['image_root']} (image_root of {entry['file']} in train_file)"
            )
    return roots


def _evaluated_splits(config: dict[str, Any], args: argparse.Namespace) -> dict[str, ProcessedEval]:
    files = evaluation_files(config)
    root = _image_roots(config)[1]
    splits = {}
    for split in files if args.evaluate else [args.select]:
        data = load_processed_eval(files[split], root)
        if not set(data.q_pids) & set(data.g_pids):
            raise DatasetError(
                f"{files[split]} has {len(data.captions)} captions and {len(data.image_paths)} images, and no caption "
                "whose person has an image, so nothing can be evaluated: complete the file"
            )
        # An evaluation file has a caption list per image, so its captions are known by their text alone.
        _refuse_empty(((caption, files[split]) for caption in data.captions), config)
        splits[split] = data
    return splits


def _training_set(config: dict[str, Any]) -> tuple[SDA | ProcessedTrain, Sequence[str]]:
    """The annotation, and the image of every pair."""
    data: SDA | ProcessedTrain
    if "train_file_regions" in config:
        data = load_sda(config["train_file_regions"], config["image_root"])
        records, paths = data.records, data.records.image_paths
        _refuse_empty(zip(records.captions, paths), config)
        if any(comes_out_empty(phrase, False) for phrase in records.phrases):
            phrases = ((phrase, record.image_path) for record in records for phrase in record.phrases)
            _refuse_empty(phrases, {**config, "icfg_rstp": False})
    else:
        data = load_processed_train(config["train_file"], config["image_root"])
        paths = data.image_paths
        _refuse_empty(zip(data.captions, paths), config)
    check_training_size(len(paths), config["batch_size_train"], 1)
    return data, paths


def _refuse_empty(captions: Iterable[tuple[str, str]], config: dict[str, Any]) -> None:
    """Refuse captions of which nothing is left, now and not in the middle of an epoch.

    Args:
        captions: each with its image or file, for the message.
        config: `icfg_rstp`, the cleaning of the task.
    """
    clean = bool(config.get("icfg_rstp"))
    empty = [(caption, where) for caption, where in captions if comes_out_empty(caption, clean)]
    if empty:
        caption, where = empty[0]
        cleaned = " once it is cleaned (icfg_rstp keeps letters a-z and digits)" if clean and caption.strip() else ""
        raise DatasetError(
            f"{len(empty)} caption(s) or phrase(s) hold no text: the first is {caption!r}, of {where}, which is empty"
            f"{cleaned}: correct or remove these records"
        )


def check_training_size(pairs: int, batch_size: int, processes: int) -> None:
    """Require one step per epoch.

    Raises:
        DatasetError: the training set is smaller than a batch of all processes.
    """
    if pairs < batch_size * processes:
        raise DatasetError(
            f"the training set has {pairs} pairs, which do not fill one batch of {batch_size * processes} "
            f"({batch_size} on each of {processes} process(es)): give more data, or lower --bs"
        )

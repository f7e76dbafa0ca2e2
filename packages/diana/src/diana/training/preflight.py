"""What can be known to be wrong before torch is loaded: flags against each other, paths, data, the output folder."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from diana.options import TRAIN_DATASETS, VERSION, parse_train_flags
from diana.training.checkpoint_folders import checkpoint_to_resume
from diana.training.trainer_flags import has_unknown, read_trainer_flags, take_flag
from tbps_common.errors import CheckpointError, InputError

# Flag -> variable of the shell scripts that sets it.
VARIABLES = {
    "vision_pretrained": "VISION_PRETRAINED",
    "llama_pretrained": "LLAMA_PRETRAINED",
    "pretrained": "PRETRAINED",
    "output_dir": "OUTPUT_DIR",
    "config_dir": "CONFIG_DIR",
}
_PLACEHOLDER = re.compile(r"<[^>]*>")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def parse_and_check(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """`parse_train_flags` and `check_training`; an unknown flag is told before anything is looked for on the disk.

    Raises:
        InputError: something cannot be used.
        SystemExit: status 2 after argparse's message, 0 after `--help`.
    """
    args, rest = parse_train_flags(argv)
    if has_unknown(rest):
        read_trainer_flags(["--output_dir", "unused", *take_flag(rest, "deepspeed")[0]], cpu=True)
    check_training(args, rest)
    return args, rest


def check_training(args: argparse.Namespace, rest: Sequence[str]) -> None:
    """Check flags and paths of a training run without loading torch.

    Args:
        args: flags of `parse_train_flags`.
        rest: the words it left over.

    Raises:
        InputError: something cannot be used; says which flag or file, and what to do.
    """
    if args.dataset_name not in TRAIN_DATASETS or args.version != VERSION:
        raise InputError(f"--dataset_name must be one of {', '.join(TRAIN_DATASETS)}, and --version {VERSION}")
    output_dir = take_flag(rest, "output_dir")[1]
    if not output_dir:
        raise InputError("--output_dir is missing: name the folder for checkpoints")
    for name, path in {**{name: getattr(args, name, None) for name in VARIABLES}, "output_dir": output_dir}.items():
        if path and _PLACEHOLDER.search(path):
            raise InputError(
                f"--{name} {path} still holds a placeholder: set {VARIABLES[name]} (environment, or the line in the "
                "shell script) to the real folder"
            )
    check_sources(args)
    check_data(args)
    deepspeed = take_flag(rest, "deepspeed")[1]
    if deepspeed and not Path(deepspeed).is_file():
        raise InputError(f'--deepspeed {deepspeed} does not exist: give the JSON file, or --deepspeed "" for none')
    if not _asks_to_resume(rest):
        checkpoint_to_resume(Path(output_dir), overwrite=args.overwrite_output_dir)


def check_sources(args: argparse.Namespace) -> None:
    """Where weights, tokenizer and sizes come from.

    Raises:
        InputError: a source is not given, or does not exist.
    """
    if args.pretrained is not None:
        _require_folder("pretrained", args.pretrained)
        if args.llama_pretrained:
            _require_folder("llama_pretrained", args.llama_pretrained)
        return
    needed = ["llama_pretrained"] if args.init_from_scratch else ["vision_pretrained", "llama_pretrained"]
    for name in needed:
        if not getattr(args, name):
            raise InputError(
                f"--{name} is missing: give the backbone's folder, or --pretrained with a DiaNA checkpoint"
                + (" (the tokenizer is read from it)" if args.init_from_scratch else "")
            )
        _require_folder(name, getattr(args, name))
    from diana.model.config import DiaNAConfig

    try:
        DiaNAConfig.from_pretrained(args.config_dir)
    except CheckpointError as error:
        raise InputError(f"--config_dir {args.config_dir}: {error}") from error


def _require_folder(name: str, path: str) -> None:
    if Path(path).is_dir():
        return
    # What looks like a name on the hub but begins with a folder of ours is a path that is not there yet.
    hub = _HUB_NAME.fullmatch(path) and Path(path).parts[0] not in ("work_dirs", ".", "..")
    if hub and not Path(path).parent.is_dir():
        return
    remedy = "run shell/pretrain.sh first, or set" if name == "pretrained" else "set"
    raise InputError(f"--{name} {path} is no folder: {remedy} {VARIABLES[name]} to the right one")


def check_data(args: argparse.Namespace) -> dict:
    """The data set's entry of the YAML file, whose files exist.

    Raises:
        InputError: an entry, an annotation file or the image folder is missing.
    """
    from diana.data.annotations import image_folder, load_dataset_config

    meta = load_dataset_config(args.dataset_config_path, args.dataset_name)
    key = f"{args.split}_annotation"
    if key not in meta:
        known = ", ".join(name.removesuffix("_annotation") for name in meta if name.endswith("_annotation"))
        raise InputError(
            f"--split {args.split}: {args.dataset_config_path} has no {key} for {args.dataset_name} (it has: {known})"
        )
    files = [meta[key]] if isinstance(meta[key], str) else list(meta[key])
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"annotation file {missing[0]}{more} of {args.dataset_name} does not exist: set DIANA_DATA_ROOT to the folder "
            f"that holds the data sets, or correct {args.dataset_config_path}"
        )
    meta["image_root"] = image_folder(meta)
    if not Path(meta["image_root"]).is_dir():
        raise InputError(
            f"image folder {meta['image_root']} of {args.dataset_name} does not exist: set DIANA_DATA_ROOT, or correct "
            f"{args.dataset_config_path}"
        )
    return meta


def _asks_to_resume(rest: Sequence[str]) -> bool:
    value = take_flag(rest, "resume_from_checkpoint")[1]
    return value is not None and value.lower() not in ("", "false", "none")

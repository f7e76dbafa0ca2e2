"""What can be known to be wrong before torch is loaded: flags against each other, paths, data, the output folder."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diana.checkpoints import checkpoints_to_resume
from diana.data.annotations import image_folder, load_dataset_config
from diana.model.config import DiaNAConfig
from diana.options import TrainOptions, parse_train_flags
from diana.trainer_flags import take_flag
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


def parse_and_check(argv: Sequence[str]) -> tuple[TrainOptions, list[str]]:
    """`parse_train_flags`, then a look at every path of the run.

    Raises:
        InputError: something cannot be used; the message names the flag or file, and the remedy.
        SystemExit: status 2 after argparse's message, 0 after `--help`.
    """
    options, words = parse_train_flags(argv)
    output_dir = take_flag(words, "output_dir")[1]
    if not output_dir:
        raise InputError("--output_dir is missing: name the folder for checkpoints")
    for name, variable in VARIABLES.items():
        path = output_dir if name == "output_dir" else getattr(options, name)
        if path and _PLACEHOLDER.search(path):
            raise InputError(
                f"--{name} {path} still holds a placeholder: set {variable} (environment, or the line in the shell script) "
                "to the real folder"
            )
    check_sources(options)
    check_data(options)
    deepspeed = take_flag(words, "deepspeed")[1]
    if deepspeed and not Path(deepspeed).is_file():
        raise InputError(f'--deepspeed {deepspeed} does not exist: give the JSON file, or --deepspeed "" for none')
    requested = take_flag(words, "resume_from_checkpoint")[1] or ""
    checkpoints_to_resume(requested, Path(output_dir), overwrite=options.overwrite_output_dir)
    return options, words


def check_sources(options: TrainOptions) -> None:
    """Where weights, tokenizer and sizes come from.

    Raises:
        InputError: a source is not given, or does not exist.
    """
    if options.pretrained is not None:
        _require_folder("pretrained", options.pretrained)
        if options.llama_pretrained:
            _require_folder("llama_pretrained", options.llama_pretrained)
        return
    needed = ["llama_pretrained"] if options.init_from_scratch else ["vision_pretrained", "llama_pretrained"]
    for name in needed:
        if not getattr(options, name):
            raise InputError(
                f"--{name} is missing: give the backbone's folder, or --pretrained with a DiaNA checkpoint"
                + (" (the tokenizer is read from it)" if options.init_from_scratch else "")
            )
        _require_folder(name, getattr(options, name))
    try:
        DiaNAConfig.from_pretrained(options.config_dir)
    except CheckpointError as error:
        raise InputError(f"--config_dir {options.config_dir}: {error}") from error


def _require_folder(name: str, path: str) -> None:
    if Path(path).is_dir():
        return
    # What looks like a name on the hub but begins with a folder of ours is a path that is not there yet.
    hub = _HUB_NAME.fullmatch(path) and Path(path).parts[0] not in ("work_dirs", ".", "..")
    if hub and not Path(path).parent.is_dir():
        return
    remedy = "run shell/pretrain.sh first, or set" if name == "pretrained" else "set"
    raise InputError(f"--{name} {path} is not a folder: {remedy} {VARIABLES[name]} to the right one")


def check_data(options: TrainOptions) -> dict[str, Any]:
    """The data set's entry of the YAML file, whose files exist.

    Raises:
        InputError: an entry, an annotation file or the image folder is missing.
    """
    meta = load_dataset_config(options.dataset_config_path, options.dataset_name)
    key = f"{options.split}_annotation"
    if key not in meta:
        known = ", ".join(name.removesuffix("_annotation") for name in meta if name.endswith("_annotation"))
        raise InputError(
            f"--split {options.split}: {options.dataset_config_path} has no {key} for {options.dataset_name} (it has: {known})"
        )
    files = [meta[key]] if isinstance(meta[key], str) else list(meta[key])
    missing = [file for file in files if not Path(file).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise InputError(
            f"annotation file {missing[0]}{more} of {options.dataset_name} does not exist: set DIANA_DATA_ROOT to the folder "
            f"that holds the data sets, or correct {options.dataset_config_path}"
        )
    meta["image_root"] = image_folder(meta)
    if not Path(meta["image_root"]).is_dir():
        raise InputError(
            f"image folder {meta['image_root']} of {options.dataset_name} does not exist: set DIANA_DATA_ROOT, or correct "
            f"{options.dataset_config_path}"
        )
    return meta

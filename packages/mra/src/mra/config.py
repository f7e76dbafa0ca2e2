"""Task configurations: reading the YAML files, checking them, and the flags that override them."""

import argparse
import copy
import io
import math
import os
from collections.abc import Callable
from typing import Any

from mra.model.settings import REGION_FEATURES, ModelSettings
from mra.shipped import find_shipped
from tbps_common.errors import InputError
from tbps_common.files import write_text

TASKS = ("sda", "cuhk", "icfg", "rstp")
CONFIG_NAME = "config.yaml"


class UnknownTask(InputError, NotImplementedError):
    """There is no such task (NotImplementedError is what the released run.py raises)."""


def check_task(task: str) -> None:
    """Refuse an unknown task.

    Raises:
        UnknownTask: it is not one of `TASKS`.
    """
    if task not in TASKS:
        raise UnknownTask(f"--task {task} is not implemented: choose one of {', '.join(TASKS)}")


def config_path(task: str) -> str:
    """The configuration file of a task, as `run.py` passes it on.

    Raises:
        UnknownTask: there is no such task.
    """
    check_task(task)
    return f"configs/{task}.yaml"


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML 1.2 file (`1e-4` is a number); a `configs/...` file that is not there is taken from the package.

    Raises:
        InputError: the file is missing, is not YAML, or holds no mapping.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    file = find_shipped(path)
    if not file.is_file():
        raise InputError(f"there is no configuration file {os.fspath(path)}: check --config, or the working directory")
    try:
        content = YAML(typ="safe", pure=True).load(file.read_text(encoding="utf-8-sig"))
    except MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{file}{where} is not a configuration: {error.problem}") from error
    except (YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{file} is not a configuration: {reason}") from error
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise InputError(f"{file} is {kind} instead of a mapping from keys to values")
    return content


def write_config(path: str | os.PathLike[str], config: dict[str, Any]) -> None:
    """Write a configuration that `load_config` reads, whole or not at all."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    stream = io.StringIO()
    yaml.dump(config, stream)
    write_text(path, stream.getvalue())


def with_overrides(config: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """A copy of the configuration with the flags that are set: `--bs`, `--epo`, `--lr`, `--region` and the additions."""
    changed = copy.deepcopy(config)
    if args.bs > 0:
        changed["batch_size_train"] = args.bs
    if args.epo > 0:
        changed["schedular"]["epochs"] = args.epo
    if args.lr > 0:
        changed["optimizer"]["lr"] = changed["schedular"]["lr"] = args.lr
    if args.region > 0:
        changed["region"] = args.region
    if args.region_feat:
        changed["region_feat"] = args.region_feat
    if args.gradient_checkpointing:
        changed["gradient_checkpointing"] = True
    return changed


def check_config(config: dict[str, Any], path: str | os.PathLike[str], *, training: bool) -> None:
    """Refuse a configuration that cannot work.

    Args:
        config: as `load_config` returns it.
        path: how messages name it.
        training: whether the keys of training are needed too.

    Raises:
        InputError: one sentence naming the file, the key, its value and what is allowed.
    """
    rules = {**_RULES, **(_TRAINING_RULES if training else {})}
    if training:
        rules["train_file_regions" if "train_file_regions" in config else "train_file"] = _FILES
    for name, (allowed, fits, optional) in rules.items():
        *groups, key = name.split(".")
        values = config
        for group in groups:
            values = values.get(group, {})
        if key not in values:
            if optional:
                continue
            raise InputError(f"{os.fspath(path)} lacks the key {name}: it must be {allowed}")
        if not fits(values[key]):
            raise InputError(f"{os.fspath(path)}: {name} must be {allowed}, not {values[key]!r}")
    settings = ModelSettings.from_config(config)
    sizes = settings.vision.height, settings.vision.width
    if (config["h"], config["w"]) != sizes:
        raise InputError(
            f"{os.fspath(path)}: h and w are {config['h']} and {config['w']}, but vision_config says {sizes[0]} and "
            f"{sizes[1]}: give both the same size"
        )
    for side in ("h", "w"):
        if config[side] % config["patch_size"]:
            raise InputError(
                f"{os.fspath(path)}: {side} ({config[side]}) must be a multiple of patch_size ({config['patch_size']})"
            )
    tokens = (config["h"] // config["patch_size"]) * (config["w"] // config["patch_size"])
    if tokens != settings.vision.num_tokens:
        raise InputError(
            f"{os.fspath(path)}: patch_size {config['patch_size']} makes {tokens} tokens, but the image encoder has "
            f"{settings.vision.num_tokens}: it must be 32"
        )
    if training and config.get("region", 0) > 0 and "train_file_regions" not in config:
        raise InputError(
            f"{os.fspath(path)}: region (or --region) {config['region']} needs annotated regions, and there is no key "
            "train_file_regions: use --region with the task sda only"
        )


def evaluation_files(config: dict[str, Any]) -> dict[str, str]:
    """The annotation file of each split that the task has: `val` (not icfg) and `test`."""
    return {split: config[f"{split}_file"] for split in ("val", "test") if config.get(f"{split}_file")}


Rule = tuple[str, Callable[[Any], bool], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _whole(minimum: int, *, optional: bool = False) -> Rule:
    return (
        f"a whole number of at least {minimum}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
        optional,
    )


def _number(low: float, high: float = math.inf, *, above: bool = False, optional: bool = False) -> Rule:
    text = f"a number {'above' if above else 'of at least'} {low:g}" + (
        f" and below {high:g}" if high < math.inf else ""
    )
    return (
        text,
        lambda value: _is_number(value) and (value > low or (value == low and not above)) and value < high,
        optional,
    )


def _one_of(*names: str, optional: bool = False) -> Rule:
    return f"one of {', '.join(names)}", lambda value: value in names, optional


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


_TEXT: Rule = ("a path", _is_text, False)
_OPTIONAL_TEXT: Rule = ("a path", _is_text, True)
_SWITCH: Rule = ("True or False", lambda value: isinstance(value, bool), True)
_FILES: Rule = (
    "a list of files",
    lambda value: isinstance(value, list) and bool(value) and all(_is_text(file) for file in value),
    False,
)
_MAPPING: Rule = ("a mapping", lambda value: isinstance(value, dict), False)
_SIZES: Rule = ("a path or a mapping", lambda value: _is_text(value) or isinstance(value, dict), False)

_RULES: dict[str, Rule] = {
    "image_root": _TEXT,
    "image_root_test": _OPTIONAL_TEXT,
    "val_file": _OPTIONAL_TEXT,
    "test_file": _TEXT,
    "vision_config": _SIZES,
    "text_config": _SIZES,
    "text_encoder": _TEXT,
    "patch_size": _whole(1),
    "h": _whole(1),
    "w": _whole(1),
    "window_size": _whole(2, optional=True),
    "embed_dim": _whole(1),
    "itc_dop": _number(0, 1, optional=True),
    "temp": _number(0, above=True),
    "max_tokens": _whole(4),
    "max_words": _whole(1),
    "icfg_rstp": _SWITCH,
    "test_hflip": _SWITCH,
    "batch_size_test": _whole(1),
    "batch_size_test_text": _whole(1),
    "k_test": _whole(1),
    "region": _number(0, optional=True),
    "region_feat": _one_of(*REGION_FEATURES, optional=True),
}
_TRAINING_RULES: dict[str, Rule] = {
    "erasing_p": _number(0),
    "eda": _SWITCH,
    "synonyms": _OPTIONAL_TEXT,
    "load_pretrained": _SWITCH,
    "load_params": _SWITCH,
    "lr_2": _SWITCH,
    "init_cross": _SWITCH,
    "LabelSmooth": _number(0, 1, optional=True),
    "mask_prob": _number(0),
    "max_masks": _whole(1),
    "skipgram_prb": _number(0),
    "skipgram_size": _whole(1),
    "mask_whole_word": _SWITCH,
    "batch_size_train": _whole(2),
    "optimizer": _MAPPING,
    "optimizer.lr": _number(0),
    "optimizer.weight_decay": _number(0),
    "optimizer.lr_mult": _number(0, optional=True),
    "optimizer.lr_x": _number(0, optional=True),
    "schedular": _MAPPING,
    "schedular.sched": _one_of("linear", "step"),
    "schedular.epochs": _whole(1),
    "schedular.num_warmup_steps": _number(0),
}


def checkpoint_needed(config: dict[str, Any], *, evaluate: bool) -> bool:
    """Whether a run starts from `--checkpoint`: an evaluation always does, a training where the task says so."""
    return evaluate or bool(config.get("load_pretrained"))

"""Task configurations: the YAML files, what their values may be, and the flags that override them."""

import argparse
import copy
import io
import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from mra.model.settings import ModelSettings, Settings, Whole, find_shipped
from tbps_common.errors import InputError
from tbps_common.files import write_text

TASKS = ("sda", "cuhk", "icfg", "rstp")
CONFIG_NAME = "config.yaml"

Text = Annotated[str, Field(min_length=1)]
Files = Annotated[list[Text], Field(min_length=1)]
NotNegative = Annotated[float, Field(ge=0)]


class EvaluationSettings(ModelSettings):
    """What an evaluation needs."""

    image_root: Text
    image_root_test: Text | None = None
    val_file: Text | None = None
    test_file: Text
    text_encoder: Text = Field()
    patch_size: Whole
    h: Whole
    w: Whole
    window_size: int = Field(7, ge=2)
    max_words: Whole
    icfg_rstp: bool = False
    test_hflip: bool = False
    batch_size_test: Whole
    batch_size_test_text: Whole
    k_test: Whole

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        size = self.vision.height, self.vision.width
        if (self.h, self.w) != size:
            raise ValueError(
                f"h and w are {self.h} and {self.w}, but vision_config says {size[0]} and {size[1]}: give both the same size"
            )
        tokens = (self.h // self.patch_size) * (self.w // self.patch_size)
        if self.h % self.patch_size or self.w % self.patch_size or tokens != self.vision.num_tokens:
            raise ValueError(
                f"patch_size {self.patch_size} does not cut {self.h} x {self.w} pixels into the {self.vision.num_tokens} "
                "tokens of the image encoder: it must be 32"
            )
        return self


class OptimizerSettings(Settings):
    """Rates of the parameter groups (`mra.param_groups`)."""

    lr: NotNegative
    weight_decay: NotNegative
    lr_mult: NotNegative = 1.0
    lr_x: NotNegative = 1.0


class ScheduleSettings(Settings):
    """The learning rate over a run (`mra.lr_multiplier`)."""

    sched: Literal["linear", "step"]
    epochs: Whole
    num_warmup_steps: Annotated[int, Field(ge=0)] | NotNegative


class TrainFile(Settings):
    """A training file with images or people of its own (`tbps_common.datasets.load_processed_train`)."""

    file: Text
    image_root: Text | None = None
    own_ids: bool = False


class TrainingSettings(EvaluationSettings):
    """What a training needs."""

    train_file: Annotated[list[Text | TrainFile], Field(min_length=1)] | None = None
    train_file_regions: Files | None = None
    erasing_p: NotNegative
    synonyms: Text | None = None
    load_pretrained: bool = False
    mask_prob: NotNegative
    max_masks: Whole
    skipgram_prb: NotNegative
    skipgram_size: Whole
    mask_whole_word: bool = True
    batch_size_train: int = Field(ge=2)
    optimizer: Annotated[OptimizerSettings, Field(strict=False)]
    schedular: Annotated[ScheduleSettings, Field(strict=False)]

    @model_validator(mode="after")
    def _check_files(self) -> Self:
        if self.train_file_regions is None and self.train_file is None:
            raise ValueError("the key train_file, a list of files, is missing")
        if self.region > 0 and self.train_file_regions is None:
            raise ValueError(
                f"region (or --region) {self.region} needs annotated regions, and there is no key train_file_regions: use "
                "--region with the task sda only"
            )
        return self


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
    """Read a YAML 1.2 file (`1e-4` is a number); a `configs/...` file that does not exist is taken from the package.

    Raises:
        InputError: the file is missing, is not YAML, or does not hold a mapping.
    """
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
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    stream = io.StringIO()
    yaml.dump(config, stream)
    write_text(Path(path), stream.getvalue())


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


def check_config(config: dict[str, Any], path: str | os.PathLike[str], *, training: bool) -> EvaluationSettings:
    """Refuse a configuration that cannot work.

    Args:
        config: as `load_config` returns it.
        path: how messages name it.
        training: whether the keys of training are needed too.

    Raises:
        InputError: one sentence naming the file, the key, its value and what is allowed.
    """
    return (TrainingSettings if training else EvaluationSettings).from_config(config, os.fspath(path))


def evaluation_files(config: dict[str, Any]) -> dict[str, str]:
    """The annotation file of each split that the task has: `val` (not icfg) and `test`."""
    return {split: config[f"{split}_file"] for split in ("val", "test") if config.get(f"{split}_file")}

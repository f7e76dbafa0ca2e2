"""`configs.yaml` of a run directory: all flags of the run, readable by this package and by the authors' code.

The authors' files hold their tuples under the tag `!!python/tuple`, which PyYAML's safe loader refuses. That one tag is
accepted here and nothing else; what is written has plain lists, which the authors' code only iterates over.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from easydict import EasyDict

from cmlfa.options import default_options, flag_problem
from tbps_common.errors import InputError
from tbps_common.files import write_text

CONFIG_NAME = "configs.yaml"

# Whether a pickled checkpoint may be trusted is decided anew for each command, never by a file that came with it.
_NOT_SAVED = ("trust_checkpoint",)

# Flags that may differ between a run and its continuation.
_NOT_COMPARED = ("resume", "resume_ckpt_file", "output_dir", "local_rank", "training", *_NOT_SAVED)


class _TupleLoader(yaml.SafeLoader):
    """PyYAML's safe loader, and tuples."""


def _construct_tuple(loader: yaml.SafeLoader, node: yaml.Node) -> tuple[Any, ...]:
    if not isinstance(node, yaml.SequenceNode):
        raise yaml.constructor.ConstructorError(None, None, "expected a sequence under !!python/tuple", node.start_mark)
    return tuple(loader.construct_sequence(node, deep=True))


_TupleLoader.add_constructor("tag:yaml.org,2002:python/tuple", _construct_tuple)


def load_train_configs(path: str | os.PathLike[str]) -> EasyDict:
    """Read the flags of a run, as a mapping whose keys are also attributes.

    Values are returned as stored and unknown keys are kept; flags that the file lacks (files of the authors' code know
    nothing of this project's flags) get their defaults, which are the released behaviour.

    Raises:
        InputError: the file is missing, is not a YAML mapping, or holds a value that its flag does not allow.
    """
    stored = _read_mapping(Path(path))
    defaults = default_options()
    for name, value in stored.items():
        # PyYAML follows YAML 1.1, where 1e-5 (without a dot) is a string; people write it by hand.
        if isinstance(value, str) and isinstance(defaults.get(name), float):
            stored[name] = value = _number_or_text(value)
        problem = flag_problem(name, value)
        if problem is not None:
            raise InputError(f"{path}: {name} {problem}; correct that line")
    return EasyDict({**defaults, **stored, **dict.fromkeys(_NOT_SAVED, False)})


def save_train_configs(directory: str | os.PathLike[str], args: argparse.Namespace | Mapping[str, Any]) -> Path:
    """Write `directory/configs.yaml`: every flag in alphabetical order, tuples as plain lists.

    Returns:
        The path of the written file.
    """
    flags = dict(args) if isinstance(args, Mapping) else vars(args)
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in flags.items()}
    for name in _NOT_SAVED:
        plain.pop(name, None)
    path = Path(directory) / CONFIG_NAME
    write_text(path, yaml.safe_dump(plain, default_flow_style=False, sort_keys=True, allow_unicode=True))
    return path


def changed_flags(stored: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Flags that a run and its continuation give different values: name -> (stored value, new value)."""

    def comparable(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return {
        name: (stored.get(name), value)
        for name, value in flags.items()
        if name not in _NOT_COMPARED and comparable(stored.get(name)) != comparable(value)
    }


def _read_mapping(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file in it, {path / CONFIG_NAME}")
    if not path.is_file():
        raise InputError(f"there is no file {path}: --config_file expects the {CONFIG_NAME} of a run directory")
    try:
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=_TupleLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise InputError(f"{path}{where} is not a {CONFIG_NAME} this program can read: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is not a {CONFIG_NAME} this program can read: {reason}") from error
    except RecursionError as error:
        raise InputError(f"{path} is not a {CONFIG_NAME} this program can read: it is nested too deeply") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise InputError(
            f"{path} is {kind} instead of a mapping from flags to values: is it the {CONFIG_NAME} of a run?"
        )
    return content


def _number_or_text(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

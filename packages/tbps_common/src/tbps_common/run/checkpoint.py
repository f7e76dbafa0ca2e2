"""Checkpoints: written whole or not at all, read without running code that a file brings along, fitted strictly.

`torch.load` un-pickles, and a pickle can call any function. Files are therefore read with `weights_only=True`, whose
own allow-list covers tensors, plain containers and optimizer states. Checkpoints of this field also hold numpy scalars
(a best score) or a configuration read by ruamel.yaml; for those the load is tried once more with a closed list of names.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as load_safetensors
from torch import Tensor

from tbps_common.errors import CheckpointError
from tbps_common.files import atomic_path
from tbps_common.models.source import HUB_CONFIG, HUB_WEIGHTS, is_hub_folder

TRUST_FLAG = "--trust-checkpoint"


class _Forgotten:
    """Stands for the comments and line numbers that ruamel.yaml keeps beside the values of a configuration."""

    def __new__(cls, *_: Any) -> "_Forgotten":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _Number(float):
    """Stands for ruamel.yaml's float with a remembered spelling."""

    def __setstate__(self, state: Any) -> None:
        pass


_ARRAY_PARTS: tuple[Any, Any] = np.float64(0).__reduce__()[0], np.zeros(0).__reduce__()[0]
_RUAMEL_REMARKS = ("comments.Comment", "comments.Format", "comments.LineCol", "tokens.CommentToken", "error.StringMark")
_HARMLESS: list[Any] = [
    # numpy's arrays and scalars of numbers. numpy 1 wrote numpy.core, numpy 2 writes numpy._core.
    *((part, f"numpy.{core}.multiarray.{part.__name__}") for part in _ARRAY_PARTS for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["Float"] + "?U"},
    (bytes, "builtins.bytes"),  # the content of an empty array
    # A Counter is the one mapping that torch's un-pickler both fills and lets carry attributes. Lists cannot carry any
    # there: a ruamel sequence with remembered line numbers is refused, and needs a trusting load.
    (Counter, "ruamel.yaml.comments.CommentedMap"),
    (list, "ruamel.yaml.comments.CommentedSeq"),
    (_Number, "ruamel.yaml.scalarfloat.ScalarFloat"),
    *((_Forgotten, f"ruamel.yaml.{name}") for name in _RUAMEL_REMARKS),
]

# Where the weights lie in a file, and what DistributedDataParallel and torch.compile add to the names.
_CONTAINER_KEYS = ("model", "state_dict", "model_state_dict", "net")
_DISTRIBUTED, _COMPILED = "module.", "_orig_mod."
_ROOM_FACTOR = 1.2
_FETCH = "copy or download it again, or give another checkpoint"
_SHOWN = 5


def load_checkpoint_file(path: str | os.PathLike[str], *, trust: bool = False, mmap: bool = False) -> Any:
    """Read a checkpoint onto the CPU without running code from it.

    Args:
        path: a `.safetensors` file (gives a dict of tensors), a file written by `torch.save`, or a folder in the layout of the
            hub with `config.json` and `model.safetensors` (gives `{"model": tensors, "config": content}`).
        trust: unpickle without any restriction (the flag `--trust-checkpoint`). The file can then run any code; this is
            the only place of the project that allows it, and only for a file the user vouches for.
        mmap: leave the tensors in the file until they are read. Saves memory when only a part is wanted (the weights
            of a resume file that also holds the optimizer); the file must not be overwritten in place meanwhile.

    Returns:
        What was saved. Records of a torch file are compared with their stored checksums first, because `torch.load`
        does not do it and would return flipped bits as weights; safetensors stores no checksums.

    Raises:
        CheckpointError: the file is absent, empty, damaged, or asks for a global that is not on the closed list.
    """
    file = Path(path)
    if is_hub_folder(file):
        return {"model": load_checkpoint_file(file / HUB_WEIGHTS, mmap=mmap), "config": _read_config(file / HUB_CONFIG)}
    start = _first_bytes(file)
    if file.suffix == ".safetensors":
        try:
            mapped = load_safetensors(file)
            state = mapped if mmap else {name: tensor.clone() for name, tensor in mapped.items()}
            with safe_open(file, "pt") as opened:
                # Of tensors that are one, safetensors stores the first, and the names of the others as remarks.
                twins = opened.metadata() or {}
            return state | {name: state[twin] for name, twin in twins.items() if name not in state and twin in state}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{file} is not a readable safetensors file ({_first_line(error)}); {_FETCH}."
            ) from error
    is_archive = zipfile.is_zipfile(file)
    if is_archive:
        _verify_archive(file)
    elif start == b"PK\x03\x04":
        raise CheckpointError(f"{file} is cut off (its table of contents is missing); {_FETCH}.")
    return _unpickle(file, trust, mmap and is_archive)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not readable JSON ({_first_line(error)}); {_FETCH}.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold one JSON object; {_FETCH}.")
    return content


def _first_bytes(file: Path) -> bytes:
    """Require a file that can be read and is not empty."""
    try:
        with open(file, "rb") as content:
            start = content.read(4)
    except (OSError, ValueError) as error:
        if os.path.isfile(file / "adapter_config.json"):
            sentence = (
                f"{file} holds only a LoRA adapter (adapter_config.json), which changes another model: give the weights of "
                "the whole model."
            )
        elif os.path.isdir(file):
            sentence = f"{file} is a folder, not a checkpoint; give the file inside it (such as best.pth)."
        elif isinstance(error, FileNotFoundError):
            sentence = f"Checkpoint {file} does not exist; check the path."
        elif isinstance(error, OSError):
            sentence = f"Checkpoint {file} cannot be opened ({error.strerror}); check its permissions."
        else:
            sentence = f"Checkpoint path {str(file)!r} is not a valid path ({error}); check it."
        raise CheckpointError(sentence) from error
    if not start:
        raise CheckpointError(f"Checkpoint {file} is empty (0 bytes); {_FETCH}.")
    return start


def _verify_archive(file: Path) -> None:
    """Compare each record with its checksum, and refuse what torch.save never writes."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            names = [record.filename for record in records]
            if any(name.endswith("/constants.pkl") for name in names):
                raise CheckpointError(
                    f"{file} is a TorchScript archive (a program), not a checkpoint; give a state dict saved by "
                    "torch.save, or a .safetensors file."
                )
            if not any(name.endswith("/data.pkl") for name in names):
                raise CheckpointError(f"{file} is a zip archive but no checkpoint of torch.save; give another file.")
            if sum(record.file_size for record in records) > file.stat().st_size:
                raise CheckpointError(
                    f"{file} holds compressed or overlapping records, which torch.save never writes; give another file."
                )
            wrong = [record.filename for record in records if not _checksum_holds(archive, record)]
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, ValueError, EOFError) as error:
        raise CheckpointError(f"{file} is damaged ({_first_line(error)}); {_FETCH}.") from error
    # torch can be told not to compute checksums; then none of them fits, while damage spoils one or a few.
    if wrong and len(wrong) < len(records):
        raise CheckpointError(f"{file} is damaged (record {wrong[0]} does not match its checksum); {_FETCH}.")


def _checksum_holds(archive: zipfile.ZipFile, record: zipfile.ZipInfo) -> bool:
    try:
        with archive.open(record) as content:
            while content.read(1 << 20):
                pass
    except zipfile.BadZipFile as error:
        if "CRC" in str(error):
            return False
        raise
    return True


def _unpickle(file: Path, trust: bool, mmap: bool) -> Any:
    try:
        if trust:
            return torch.load(file, map_location="cpu", weights_only=False, mmap=mmap)
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
        except pickle.UnpicklingError as error:
            refused = error
        try:
            with torch.serialization.safe_globals(_HARMLESS):
                return _plain(torch.load(file, map_location="cpu", weights_only=True, mmap=mmap))
        except pickle.UnpicklingError as error:
            raise _refusal(file, error) from error
        except Exception as error:
            # The names were on the list, what is done with them is not plain: the first refusal says which name it was.
            raise _refusal(file, refused) from error
    except CheckpointError:
        raise
    except (MemoryError, RecursionError) as error:
        raise CheckpointError(f"{file} asks for more memory than there is; {_FETCH}.") from error
    except Exception as error:
        # A damaged or hostile pickle can make the reader fail with nearly any exception.
        raise CheckpointError(f"{file} is not a readable checkpoint ({_first_line(error)}); {_FETCH}.") from error


def _plain(value: Any) -> Any:
    """Replace what stands for ruamel.yaml's containers and numbers by ordinary ones."""
    if isinstance(value, _Number):
        return float(value)
    if type(value) in (list, tuple):
        return type(value)(_plain(entry) for entry in value)
    if isinstance(value, dict):
        kind = dict if type(value) is Counter else type(value)
        return kind((key, _plain(entry)) for key, entry in value.items())
    return value


def _refusal(file: Path, error: pickle.UnpicklingError) -> CheckpointError:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if named is None:
        # torch wraps its reason in advice on how to switch the safeguard off; only the reason is passed on.
        reason = str(error).split("\n\n")[1] if str(error).count("\n\n") else str(error)
        return CheckpointError(f"{file} is not a readable checkpoint ({_first_line(reason)}); {_FETCH}.")
    return CheckpointError(
        f"{file} was not loaded because it asks for {named[1]}, which could run code on this machine; "
        f"if you trust where the file comes from, run again with {TRUST_FLAG}."
    )


def _first_line(error: BaseException | str) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def save_checkpoint(obj: Any, path: str | os.PathLike[str]) -> None:
    """`torch.save`, whole or not at all; what could not be read back without trust is not written.

    Args:
        obj: tensors in plain containers with numbers and strings: `load_checkpoint_file` must be able to read it.
        path: target; an existing file stays as it is until the new one is complete and on the disk.

    Raises:
        TypeError: `obj` holds something (an argparse.Namespace, a Path) that only a trusting load could read.
        OSError: the disk is full or the folder cannot be written; the message gives the free space.
    """
    file = Path(path)
    if file.is_file():
        wanted = int(file.stat().st_size * _ROOM_FACTOR)
        if shutil.disk_usage(file.parent).free < wanted:
            raise _no_room(file, errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: about {wanted} bytes are needed")
    with atomic_path(file) as temporary:
        try:
            # An open file lets the system's own error through; given a path, torch reports a full disk as a format error.
            with open(temporary, "wb") as stream:
                torch.save(obj, stream)
        except (RuntimeError, OSError) as error:  # torch wraps the system's error when it closes the archive
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise _no_room(file, cause.errno or errno.EIO, cause.strerror or str(cause)) from error
        with torch.serialization.safe_globals(_HARMLESS):
            refused = torch.serialization.get_unsafe_globals_in_checkpoint(temporary)
        if refused:
            raise TypeError(
                f"{file} was not written: it would hold {sorted(refused)[0]}, which only a trusting load reads."
            )


def _no_room(file: Path, number: int, reason: str) -> OSError:
    free = shutil.disk_usage(file.parent).free
    return OSError(number, f"{reason}; the checkpoint was not written, {free} bytes are free", str(file))


def find_state_dict(obj: Any, *, source: str = "the checkpoint") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split what a checkpoint holds into the tensors of the model and everything else.

    Understands a bare state dict, `{"model": state_dict, ...}`, likewise `state_dict`, `model_state_dict` and `net`, and
    nestings of these. What torch.compile adds to names (`_orig_mod.`, anywhere) is taken out, and the prefix `module.` of
    DistributedDataParallel if every key has it.

    Args:
        obj: what `load_checkpoint_file` returned.
        source: how error messages name it.

    Returns:
        The tensors by name, and the remaining entries (epoch, optimizer, ...) of all levels.

    Raises:
        CheckpointError: there are no tensors, or their keys are not strings.
    """
    rest: dict[str, Any] = {}
    entries = obj
    opened: set[int] = set()
    while isinstance(entries, Mapping) and id(entries) not in opened:  # a pickled mapping can hold itself
        opened.add(id(entries))
        inner = next((key for key in _CONTAINER_KEYS if isinstance(entries.get(key), Mapping)), None)
        if inner is None:
            break
        rest = {**{str(key): value for key, value in entries.items() if key != inner}, **rest}
        entries = entries[inner]
    if not isinstance(entries, Mapping):
        raise CheckpointError(
            f"{source} holds a {type(entries).__name__}, not the weights of a model; give another file."
        )
    state = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if not state or not all(isinstance(key, str) for key in state):
        found = ", ".join(repr(key) for key in list(entries)[:_SHOWN]) or "nothing"
        raise CheckpointError(
            f"{source} holds no weights under names of parameters (found: {found}); give another file."
        )
    rest = {**{str(key): value for key, value in entries.items() if key not in state}, **rest}
    state = {key.replace(_COMPILED, ""): value for key, value in state.items()}
    if all(key.startswith(_DISTRIBUTED) for key in state):
        state = {key.removeprefix(_DISTRIBUTED): value for key, value in state.items()}
    return state, rest


def _nothing(_: str) -> bool:
    return False


def load_state_dict_strictly(
    module: torch.nn.Module,
    state: Mapping[str, Tensor],
    *,
    source: str,
    may_be_missing: Callable[[str], bool] = _nothing,
    skip_shape_mismatch: Callable[[str], bool] = _nothing,
) -> list[str]:
    """Copy `state` into `module` if the keys and shapes agree; otherwise change nothing and say what disagrees.

    Values are converted to the dtype and device of the module's own tensors.

    Args:
        module: receives the weights.
        state: tensors by name, as `find_state_dict` gives them.
        source: how messages name the checkpoint (its path).
        may_be_missing: for which names the module may keep its own values if the checkpoint lacks them.
        skip_shape_mismatch: for which names it may keep them if the shapes differ.

    Returns:
        One sentence for each liberty taken; empty if everything was loaded.

    Raises:
        CheckpointError: in one sentence, the first five missing, unexpected and misshapen entries.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in state]
    unexpected = [name for name in state if name not in own]
    misfits = [name for name in own if name in state and not _fits(own[name], state[name])]
    kept = [name for name in misfits if skip_shape_mismatch(name)]
    lacking = [name for name in missing if may_be_missing(name)]
    wrong_shapes = [
        f"{name} {_shape(state[name])} instead of {_shape(own[name])}" for name in misfits if name not in kept
    ]
    complaints = [
        _listed("missing", [name for name in missing if name not in lacking]),
        _listed("unexpected", unexpected),
        _listed("of another shape", wrong_shapes),
    ]
    if any(complaints):
        raise CheckpointError(
            f"{source} does not fit this model: {'; '.join(filter(None, complaints))}; "
            "give the checkpoint of this model, or the settings it was trained with."
        )
    try:
        module.load_state_dict({name: state[name] for name in state if name not in kept}, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{source} does not fit this model ({_first_line(error)}); give another file.") from error
    liberties = [_listed("not in the file", lacking), _listed("skipped for their shape", kept)]
    return [f"{source}: the model keeps its initial values for parameters {text}." for text in liberties if text]


def _fits(own: Any, given: Tensor) -> bool:
    if not isinstance(own, Tensor):
        return False
    same_kind = own.is_floating_point() == given.is_floating_point() and own.is_complex() == given.is_complex()
    return own.shape == given.shape and same_kind and given.layout == torch.strided


def _shape(tensor: Any) -> str:
    if not isinstance(tensor, Tensor):
        return type(tensor).__name__
    kind = "" if tensor.is_floating_point() else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"[{', '.join(map(str, tensor.shape))}]{kind}"


def _listed(what: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{what}: {', '.join(names[:_SHOWN])}{more}"


def fingerprint(state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of weights and of the settings that decide what is computed with them.

    Independent of the order of entries and of the device, but not of the dtype: a half-precision copy of a model gives
    other features and therefore another fingerprint.

    Args:
        state: tensors by name.
        settings: values JSON can hold; tuples count as lists.
    """
    digest = hashlib.sha256()
    canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"), allow_nan=False)
    digest.update(f"{len(canonical)}\n{canonical}\n".encode())
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name!r} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()

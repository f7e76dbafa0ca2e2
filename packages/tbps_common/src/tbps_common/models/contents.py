"""Names and shapes of the tensors in a file, without reading their values and without running anything a file brings along.

A pickle is a little program; here its instructions are followed by hand (`pickletools` only lists them), and what it would
call is noted instead of called. So a file that `torch.load` refuses, or a TorchScript archive, can be looked at as well.
"""

import io
import json
import os
import pickletools
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tbps_common.errors import CheckpointError
from tbps_common.models.source import HUB_CONFIG, HUB_WEIGHTS
from tbps_common.run.checkpoint import find_state_dict

_STEMS = (HUB_WEIGHTS, "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
_WEIGHT_FILES = (*_STEMS, *(f"{name}.index.json" for name in _STEMS))
_TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file that torch.save wrote before version 1.6
_DEEPEST = 40
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What a file or folder holds.

    Attributes:
        path: it.
        files: the weight files that were looked at.
        form: how they were written.
        state: the tensors by name, without values (on torch's device `meta`).
        beside: what else the file holds (epoch, configuration, ...); objects are given as their class's name.
        config: content of the folder's `config.json`.
    """

    path: Path
    files: tuple[Path, ...]
    form: str
    state: dict[str, Tensor]
    beside: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] | None = None


def read_contents(path: str | os.PathLike[str]) -> Contents:
    """Look at a weight file, or at a folder with one (or with the parts of a diffusers pipeline).

    Raises:
        CheckpointError: it is not there, or holds no tensors in a form that is known.
    """
    place = Path(path)
    if not place.exists():
        raise CheckpointError(f"{place} does not exist; check the path.")
    files = _files_of(place) if place.is_dir() else {place: ""}
    state: dict[str, Tensor] = {}
    beside: dict[str, Any] = {}
    form = ""
    for file, prefix in files.items():
        form, content = _read(file)
        part, rest = find_state_dict(content, source=str(file))
        state |= {prefix + name: tensor for name, tensor in part.items()}
        beside |= rest
    folder = place if place.is_dir() else place.parent if place.name in _WEIGHT_FILES else None
    config = None if folder is None else read_config(folder)
    return Contents(place, tuple(files), form, state, beside, config)


def read_config(folder: Path) -> dict[str, Any] | None:
    """The object in a folder's `config.json`; None if there is no such file, or it is not a JSON object."""
    try:
        content = json.loads((folder / HUB_CONFIG).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _files_of(folder: Path) -> dict[Path, str]:
    """The weight files of a folder, each with what comes before its names."""
    whole = _weight_file(folder)
    if whole is not None:
        return dict.fromkeys(_shards(whole), "")
    parts = {part.name: file for part in sorted(folder.iterdir()) if (file := _weight_file(part)) is not None}
    if parts:
        return {shard: f"{name}." for name, file in parts.items() for shard in _shards(file)}
    there = sorted(entry.name for entry in folder.rglob("*") if entry.suffix in (".pth", ".pt", ".bin", ".safetensors"))
    named = f"; name one of its files: {', '.join(there[:5])}" if there else ""
    raise CheckpointError(f"{folder} holds no {HUB_WEIGHTS} or pytorch_model.bin{named or ' and no other weights'}.")


def _weight_file(folder: Path) -> Path | None:
    return next((folder / name for name in _WEIGHT_FILES if (folder / name).is_file()), None)


def _shards(file: Path) -> list[Path]:
    """A weight file itself, or the files that an index lists."""
    if file.suffix != ".json":
        return [file]
    try:
        names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
        shards = [file.parent / Path(name).name for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{file} is not an index of weight files; copy or download it again.") from error
    for shard in shards:
        if not shard.is_file():
            raise CheckpointError(f"{shard} is missing, but {file.name} lists it; download it again.")
    return shards


def _read(file: Path) -> tuple[str, Any]:
    try:
        with open(file, "rb") as stream:
            start = stream.read(2)
            stream.seek(0)
            if zipfile.is_zipfile(file):
                return _from_archive(file)
            if start[:1] == b"\x80":
                return _from_pickles(stream)
        with safe_open(file, "pt") as tensors:
            state = {name: _of_slice(tensors.get_slice(name)) for name in tensors.keys()}
            # Of tensors that are one, safetensors stores the first, and the names of the others as remarks.
            twins = (tensors.metadata() or {}).items()
        return "safetensors", state | {name: state[twin] for name, twin in twins if name not in state and twin in state}
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is neither a safetensors file nor one that torch.save or pickle wrote ({error}); give another file."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:
        # A damaged or hostile file can make the reader fail with nearly any exception.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise CheckpointError(
            f"{file} is damaged or of no known form ({reason}); copy or download it again."
        ) from error


def _from_archive(file: Path) -> tuple[str, Any]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickled = next((name for name in names if name.endswith("/data.pkl")), None)
        if pickled is None:
            raise CheckpointError(f"{file} is a zip archive without a data.pkl, so torch.save did not write it.")
        if archive.getinfo(pickled).compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(f"{file} holds compressed records, which torch.save never writes; give another file.")
        with archive.open(pickled) as stream:
            content = _Instructions().follow(stream)
    if any(name.endswith("/constants.pkl") for name in names):
        return "TorchScript archive", dict(_flat(content))
    return "torch.save", content


def _from_pickles(stream: IO[bytes]) -> tuple[str, Any]:
    content = _Instructions().follow(stream)
    if content != _TORCH_MAGIC:
        return "pickle", content
    for _ in range(2):  # the protocol, and facts about the machine
        _Instructions().follow(stream)
    return "torch.save before 1.6", _Instructions().follow(stream)


def _flat(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors of nested objects, under the path of attributes that leads to each."""
    if isinstance(value, Tensor):
        yield name, value
    inside = value.state if isinstance(value, _Object) else value
    if isinstance(inside, Mapping) and depth < _DEEPEST:
        for key, entry in inside.items():
            yield from _flat(entry, f"{name}.{key}" if name else str(key), depth + 1)


def _of_slice(entry: Any) -> Tensor:
    return _meta(entry.get_shape(), _DTYPES.get(entry.get_dtype(), torch.uint8))


def _meta(shape: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(int(size) for size in shape), dtype=dtype, device="meta")


class _Name(str):
    """A class or function that a pickle names, `module.name`; it is never looked up."""


class _Object:
    """What a pickle would make by calling something that is not known here."""

    def __init__(self, kind: str):
        self.kind, self.state = kind, None

    def __repr__(self) -> str:
        return f"<{self.kind}>"


class _Instructions:
    """The stack machine of pickles, with methods of the instructions' names; calls give tensors without values, or notes."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def follow(self, stream: IO[bytes]) -> Any:
        """Go through one pickle, to its STOP."""
        for instruction, argument, _ in pickletools.genops(stream):
            run = getattr(self, instruction.name, None)
            if run is not None:
                run(argument)
            elif instruction.stack_after and not instruction.stack_before:
                self.stack.append(argument)  # a number, a text or bytes
        return self.stack[-1]

    def _pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def _push(self, value: Any) -> None:
        self.stack.append(value)

    def MARK(self, _: Any) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def NONE(self, _: Any) -> None:
        self._push(None)

    def NEWTRUE(self, _: Any) -> None:
        self._push(True)

    def NEWFALSE(self, _: Any) -> None:
        self._push(False)

    def EMPTY_DICT(self, _: Any) -> None:
        self._push({})

    def EMPTY_LIST(self, _: Any) -> None:
        self._push([])

    EMPTY_SET = EMPTY_LIST

    def EMPTY_TUPLE(self, _: Any) -> None:
        self._push(())

    def TUPLE(self, _: Any) -> None:
        self._push(tuple(self._pop_to_mark()))

    FROZENSET = TUPLE

    def LIST(self, _: Any) -> None:
        self._push(self._pop_to_mark())

    def DICT(self, _: Any) -> None:
        items = self._pop_to_mark()
        self._push(dict(zip(items[::2], items[1::2])))

    def TUPLE1(self, _: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def TUPLE2(self, _: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def TUPLE3(self, _: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def APPEND(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def APPENDS(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    ADDITEMS = APPENDS

    def _extend(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def SETITEM(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def SETITEMS(self, _: Any) -> None:
        self._set(self._pop_to_mark())

    def _set(self, items: list[Any]) -> None:
        pairs = dict(zip(items[::2], items[1::2]))
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(pairs)

    def MEMOIZE(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def PUT(self, number: int) -> None:
        self.memo[number] = self.stack[-1]

    BINPUT = LONG_BINPUT = PUT

    def GET(self, number: int) -> None:
        self._push(self.memo[number])

    BINGET = LONG_BINGET = GET

    def POP(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._pop_to_mark()

    def POP_MARK(self, _: Any) -> None:
        self._pop_to_mark()

    def DUP(self, _: Any) -> None:
        self._push(self.stack[-1])

    def GLOBAL(self, name: str) -> None:
        self._push(_Name(name.replace(" ", ".")))

    def STACK_GLOBAL(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._push(_Name(f"{module}.{name}"))

    def REDUCE(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self._push(_called(str(function), arguments))

    NEWOBJ = REDUCE

    def NEWOBJ_EX(self, _: Any) -> None:
        self.stack.pop()
        self.REDUCE(_)

    def OBJ(self, _: Any) -> None:
        function, *arguments = self._pop_to_mark()
        self._push(_called(str(function), tuple(arguments)))

    def INST(self, name: str) -> None:
        self._push(_called(name.replace(" ", "."), tuple(self._pop_to_mark())))

    def BUILD(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], _Object):
            self.stack[-1].state = state

    def BINPERSID(self, _: Any) -> None:
        pass  # what identifies a storage stays where it is, as a tuple

    def STOP(self, _: Any) -> None:
        pass


def _called(function: str, arguments: Any) -> Any:
    """What a call gives: a tensor without values, a plain container, or a note of what was to be called."""
    name = function.rpartition(".")[2]
    if name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
        return _meta(arguments[2], _STORAGES.get(str(arguments[0][1]).rpartition(".")[2], torch.uint8))
    if name == "_rebuild_tensor_v3":  # storage, offset, size, stride, requires_grad, hooks, dtype
        dtype = getattr(torch, str(arguments[6]).rpartition(".")[2], None)
        return _meta(arguments[2], dtype if isinstance(dtype, torch.dtype) else torch.uint8)
    if name == "_load_from_bytes":  # how a plain pickle holds a storage: as bytes of torch.save
        return _from_pickles(io.BytesIO(arguments[0]))[1]
    if name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
        return arguments[0]
    if name == "_rebuild_from_type_v2":
        return _called(str(arguments[0]), arguments[2])
    if name in ("OrderedDict", "defaultdict", "Counter", "CommentedMap"):
        return {}
    if name == "CommentedSeq":
        return []
    if name in ("Size", "set", "frozenset") and arguments:
        return arguments[0]
    return _Object(function)

"""What stands for numpy's and ruamel.yaml's names while an untrusted checkpoint is un-pickled.

torch's restricted un-pickler calls only what is on its list. The names below are put on it for the length of one load,
each bound to a plain container or to a class of this file, so that no function of numpy or ruamel ever receives data
from the file; `plain` then replaces the stand-ins by ordinary values.
"""

from collections import Counter, OrderedDict
from typing import Any

import numpy as np


class _StoredDtype:
    """Stands for `numpy.dtype` while a file is read: remembers the type code and byte order, nothing else."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else str(state[1])
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _StoredArray:
    """Stands for a numpy array while a file is read; `plain` turns it into one afterwards."""

    array: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, stored, column_major, content = state
        flat = np.frombuffer(content, dtype=stored.dtype)
        self.array = flat.reshape(shape, order="F" if column_major else "C").copy()


class _Forgotten:
    """Stands for the comments and line numbers that ruamel.yaml keeps beside the values of a configuration."""

    def __new__(cls, *_: Any) -> "_Forgotten":
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        pass


class _StoredFloat(float):
    """Stands for ruamel.yaml's float with a remembered spelling; `plain` turns it into a float."""

    def __setstate__(self, state: Any) -> None:
        pass


def _stored_scalar(stored: _StoredDtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype=stored.dtype)[0]


def _stored_array(*_: Any) -> _StoredArray:
    return _StoredArray()


def _no_bytes() -> bytes:
    return b""


_RUAMEL_REMARKS = ("comments.Comment", "comments.Format", "comments.LineCol", "tokens.CommentToken", "error.StringMark")

HARMLESS_GLOBALS: list[Any] = [
    # numpy 1 wrote numpy.core, numpy 2 writes numpy._core
    (_stored_scalar, "numpy.core.multiarray.scalar"),
    (_stored_scalar, "numpy._core.multiarray.scalar"),
    (_stored_array, "numpy.core.multiarray._reconstruct"),
    (_stored_array, "numpy._core.multiarray._reconstruct"),
    (_StoredArray, "numpy.ndarray"),
    (_StoredDtype, "numpy.dtype"),
    (_no_bytes, "builtins.bytes"),  # the content of an empty array
    # A Counter is the one mapping that torch's un-pickler both fills and lets carry attributes. Lists cannot carry any
    # there: a ruamel sequence with remembered line numbers is refused, and needs a trusting load.
    (Counter, "ruamel.yaml.comments.CommentedMap"),
    (list, "ruamel.yaml.comments.CommentedSeq"),
    (_StoredFloat, "ruamel.yaml.scalarfloat.ScalarFloat"),
    *((_Forgotten, f"ruamel.yaml.{name}") for name in _RUAMEL_REMARKS),
]


def plain(value: Any) -> Any:
    """Replace the stand-ins of `HARMLESS_GLOBALS` in plain containers by what they stand for."""
    if isinstance(value, _StoredArray):
        return value.array
    if isinstance(value, _StoredDtype):
        return value.dtype
    if isinstance(value, _StoredFloat):
        return float(value)
    if type(value) is list:
        return [plain(entry) for entry in value]
    if type(value) is tuple:
        return tuple(plain(entry) for entry in value)
    if type(value) in (dict, OrderedDict, Counter):
        kind = OrderedDict if type(value) is OrderedDict else dict
        return kind((key, plain(entry)) for key, entry in value.items())
    return value

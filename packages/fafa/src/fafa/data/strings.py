"""A million strings in two arrays, so that loader processes share them instead of copying them."""

from collections.abc import Iterable

import numpy as np


class PackedStrings:
    """An immutable list of strings.

    A Python string is copied into every loader process as soon as that process looks at it (its reference count lies
    beside its characters); an array is not.
    """

    def __init__(self, strings: Iterable[str]):
        encoded = [string.encode("utf-8") for string in strings]
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)
        self._ends = np.cumsum([len(string) for string in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of {len(self)} strings")
        place = index % len(self)
        start = int(self._ends[place - 1]) if place else 0
        return self._bytes[start : int(self._ends[place])].tobytes().decode("utf-8")

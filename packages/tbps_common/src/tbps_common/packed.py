"""Packed numbers, strings and records: annotation of millions of records that loader processes share.

A list of Python objects is copied into every loader process: into a spawned one when it starts, into a forked one as soon
as that looks at them, because the reference count of an object lies beside its content. Packed sequences are a few long
arrays. A forked process reads those of its parent; the first spawned one moves them to shared memory (a file that has no
name where `/dev/shm` is too small), and all get a handle to it.
"""

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice
from multiprocessing import RawArray
from multiprocessing.context import get_spawning_popen
from typing import Any, TypeVar, overload

Item = TypeVar("Item")


class Packed(Sequence[Item]):
    """A sequence that makes its items when they are asked for; it equals every sequence of equal items."""

    @abstractmethod
    def item(self, place: int) -> Item:
        """The item at a place from 0 to `len(self) - 1`."""

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        size = len(self)
        if isinstance(index, slice):
            return [self.item(place) for place in range(*index.indices(size))]
        if not -size <= index < size:
            raise IndexError(f"there is no item {index} in {size}")
        return self.item(index % size)

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(one == another for one, another in zip(self, other))

    __hash__ = None  # type: ignore[assignment]


class PackedNumbers(Packed[Any]):
    """Numbers of one type, with the attribute `values`: the buffer they are in.

    Args:
        typecode: of `array.array`, for example `i` (32 bits), `q` (64 bits) or `d` (float64).
        numbers: to begin with.

    Raises:
        OverflowError: a number does not fit.
    """

    def __init__(self, typecode: str, numbers: Iterable[Any] = ()) -> None:
        self.typecode = typecode
        self.values: Any = array(typecode, numbers)
        self._shared: Any = None

    def append(self, number: Any) -> None:
        self.values.append(number)

    def extend(self, numbers: Iterable[Any]) -> None:
        self.values.extend(numbers)

    def item(self, place: int) -> Any:
        return self.values[place]

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        if get_spawning_popen() is None or not len(self):
            return PackedNumbers, (self.typecode, self.values.tobytes())
        if self._shared is None:
            content = memoryview(self.values).cast("B")
            self._shared = RawArray("B", len(content))
            shared = memoryview(self._shared).cast("B")
            shared[:] = content
            self.values = shared.cast(self.typecode)  # type: ignore[call-overload]
        return _attached, (self.typecode, self._shared)


def _attached(typecode: str, shared: Any) -> PackedNumbers:
    """The numbers of another process."""
    numbers = PackedNumbers(typecode)
    numbers._shared, numbers.values = shared, memoryview(shared).cast("B").cast(typecode)  # type: ignore[call-overload]
    return numbers


class PackedStrings(Packed[str]):
    """Strings.

    Args:
        strings: to begin with.
    """

    def __init__(self, strings: Iterable[str] = ()) -> None:
        self._text, self._ends = PackedNumbers("B"), PackedNumbers("q")
        self.extend(strings)

    def append(self, string: str) -> None:
        text = self._text.values
        text.frombytes(string.encode("utf-8"))
        self._ends.values.append(len(text))

    def extend(self, strings: Iterable[str]) -> None:
        strings = list(strings)
        text = "".join(strings)
        parts: Sequence[str | bytes] = strings if text.isascii() else [string.encode("utf-8") for string in strings]
        ends = accumulate(map(len, parts), initial=len(self._text))
        self._text.values.frombytes(text.encode("utf-8"))
        self._ends.values.extend(islice(ends, 1, None))

    def item(self, place: int) -> str:
        ends = self._ends.values
        return str(self._text.values[ends[place - 1] if place else 0 : ends[place]], "utf-8")

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        text, start = memoryview(self._text.values), 0
        for end in self._ends.values:
            yield str(text[start:end], "utf-8")
            start = end

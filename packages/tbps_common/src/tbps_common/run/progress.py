"""How far long work is: a bar on a terminal; in a log file or a cluster's job, a line now and then."""

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm import tqdm

Watcher = Callable[[int, int], None]
_WATCHER: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


@contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """In this context progress bars are not drawn; `watcher(done, total)` is called instead, wherever one would be."""
    token = _WATCHER.set(watcher)
    try:
        yield
    finally:
        _WATCHER.reset(token)


class _Watched(tqdm):  # type: ignore[type-arg]
    """A bar that is told instead of drawn."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        watcher = _WATCHER.get()
        if watcher is not None:
            watcher(int(self.n), int(self.total))
        return True


class _Lines:
    """A stream in which every redrawing of a progress bar becomes a line of its own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        text = text.strip("\r\n ")
        if text:
            self._stream.write(text + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    total: int, *, initial: int = 0, unit: str = "item", desc: str | None = None, enabled: bool = True
) -> "tqdm[Any]":
    """A bar that shows share, rate and the time left; where stderr is not a terminal, a line a minute says the same.

    Args:
        total: units of the whole work.
        initial: of them done before; they do not count for the rate.
        unit: what one is called.
        desc: stands before the bar.
        enabled: False on all processes but the main one.
    """
    shown: dict[str, Any] = {"total": total, "initial": initial, "unit": unit, "desc": desc, "disable": not enabled}
    if _WATCHER.get() is not None:
        return _Watched(**shown, file=io.StringIO(), mininterval=0, miniters=1)
    if sys.stderr.isatty():
        return tqdm(**shown, dynamic_ncols=True)
    # ncols=0: numbers without a bar. Work of less than a minute says nothing.
    return tqdm(**shown, file=_Lines(sys.stderr), mininterval=60, miniters=1, delay=60, ncols=0)

"""How far long work is: a bar on a terminal; in a log file or a cluster's job, a line now and then."""

import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

from tqdm import tqdm


class Progress:
    """Counts units of work, and shows share, rate and the time that is left; use it as `with`.

    Args:
        total: units of the whole work.
        initial: of them done before; they do not count for the rate.
        unit: what one is called.
        enabled: false on all processes but the main one.
        every: seconds between two lines where stderr is no terminal.
        say: shows a line.
        clock: seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        unit: str = "item",
        enabled: bool = True,
        every: float = 60.0,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.initial, self.done, self.unit = total, initial, initial, unit
        self._every, self._say, self._clock = every, say, clock
        self._lines = enabled and not sys.stderr.isatty()
        self._enabled = enabled
        self._notes: dict[str, Any] = {}
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        self._started = self._said = self._clock()
        self._bar = tqdm(
            total=self.total,
            initial=self.initial,
            unit=self.unit,
            dynamic_ncols=True,
            disable=self._lines or not self._enabled,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, count: int = 1, **notes: Any) -> None:
        """Count `count` more units, and show `notes` (a loss, the number of drops) beside them."""
        self.done += count
        self._notes.update(notes)
        if notes:
            self._bar.set_postfix(**self._notes, refresh=False)
        self._bar.update(count)
        now = self._clock()
        if self._lines and now - self._said >= self._every:
            self._said = now
            self._say(self.sentence(now - self._started))

    def sentence(self, seconds: float) -> str:
        """The line after `seconds` of work."""
        rate = (self.done - self.initial) / max(seconds, 1e-9)
        left = duration((self.total - self.done) / rate) if rate > 0 else "an unknown time"
        notes = "".join(f", {name} {value}" for name, value in self._notes.items())
        return f"{self.done} of {self.total} {self.unit}s, {rate:.2f} per second, {left} left{notes}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: `40 s`, `12 min`, `3 h 5 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"


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
    if sys.stderr.isatty():
        return tqdm(**shown, dynamic_ncols=True)
    # ncols=0: numbers without a bar. Work of less than a minute says nothing.
    return tqdm(**shown, file=_Lines(sys.stderr), mininterval=60, miniters=1, delay=60, ncols=0)

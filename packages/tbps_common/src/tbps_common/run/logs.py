"""Log lines of a command: on the console, and in the run directory as soon as there is one."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

FORMAT = "%(asctime)s %(name)s %(levelname)s: %(message)s"


class RunLog:
    """Holds the lines back until `open` names their file, so that a run which cannot start leaves no file behind."""

    def __init__(self) -> None:
        self._held = MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
        self._file: logging.FileHandler | None = None
        self._console = logging.StreamHandler(sys.stdout)
        self._console.setFormatter(logging.Formatter(FORMAT))

    @property
    def handlers(self) -> tuple[logging.Handler, ...]:
        """What the loggers write to."""
        return (self._console, self._held)

    def open(self, path: Path, *, append: bool) -> None:
        """Write the lines so far and all further ones to `path`."""
        self._file = logging.FileHandler(path, mode="a" if append else "w", encoding="utf-8")
        self._file.setFormatter(logging.Formatter(FORMAT))
        self._held.setTarget(self._file)
        self._held.capacity = 1  # every further line at once
        self._held.flush()

    def close(self) -> None:
        """Close the file; lines that never got a file are dropped."""
        self._held.close()
        if self._file is not None:
            self._file.close()


@contextmanager
def run_log(*names: str, enabled: bool = True) -> Iterator[RunLog]:
    """Log to the console, and to a file once `RunLog.open` is called.

    Args:
        names: of the loggers to show, beside this package's own.
        enabled: False on a process that is not the main one: it stays silent.
    """
    log = RunLog()
    loggers = [logging.getLogger(name) for name in (*names, "tbps_common")]
    before = [(logger, logger.level) for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.INFO if enabled else logging.CRITICAL)
        for handler in log.handlers if enabled else ():
            logger.addHandler(handler)
    # Lines go above a progress bar instead of tearing it apart.
    try:
        with logging_redirect_tqdm(loggers if enabled else []):
            yield log
    finally:
        for logger, level in before:
            logger.setLevel(level)
            for handler in log.handlers:
                logger.removeHandler(handler)
        log.close()

"""The folder through which `run.py` and its processes know of each other (see `mra.launch`)."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CONTROL_VARIABLE = "MRA_CONTROL"


class Control:
    """One launch. A process that nobody launched has none."""

    def __init__(self, folder: str | os.PathLike[str]):
        self._folder = Path(folder)

    @classmethod
    def of_this_process(cls) -> "Control | None":
        """The launch that this process belongs to, or None."""
        folder = os.environ.get(CONTROL_VARIABLE)
        return cls(folder) if folder and Path(folder).is_dir() else None

    # What run.py calls.

    def processes(self) -> list[int]:
        """Process ids of the processes that have come up."""
        return [int(path.read_text(encoding="utf-8")) for path in self._folder.glob("*.pid")]

    def status(self) -> int | None:
        """Exit status of the first process, or None if it left none (it was killed)."""
        try:
            return int((self._folder / "status").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Hold the pipe open that the processes read: its end tells them that this program has gone."""
        if not hasattr(os, "mkfifo"):
            yield
            return
        os.mkfifo(self._pipe)
        descriptor = os.open(self._pipe, os.O_RDWR)  # reading too, because opening for writing alone would wait
        try:
            yield
        finally:
            os.close(descriptor)

    # What a process of the run calls.

    def announce(self, local_rank: int) -> None:
        """Say that signals can be handled from now on; stop like at a SIGTERM if `run.py` is killed."""
        if self._pipe.exists():
            threading.Thread(target=self._watch, name="run.py is there", daemon=True).start()
        partial = self._folder / f"{local_rank}.partial"
        partial.write_text(str(os.getpid()), encoding="utf-8")
        partial.rename(self._folder / f"{local_rank}.pid")

    def report(self, status: int) -> None:
        """Leave the exit status of the first process."""
        partial = self._folder / "status.partial"
        partial.write_text(str(status), encoding="utf-8")
        partial.rename(self._folder / "status")

    @property
    def _pipe(self) -> Path:
        return self._folder / "alive"

    def _watch(self) -> None:
        descriptor = os.open(self._pipe, os.O_RDONLY)
        while os.read(descriptor, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

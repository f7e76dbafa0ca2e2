"""Ctrl-C and SIGTERM: the first asks the run to stop after the current step, the second ends the process at once."""

import os
import signal
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbps_common.run.distributed import Ranks

_MESSAGES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interruption:
    """Context in which both signals only set a flag, once; a second signal has its usual effect.

    Outside the main thread Python delivers no signals; there the context does nothing.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._previous: dict[int, Any] = {}
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._signal is not None

    @property
    def exit_status(self) -> int:
        """130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + (self._signal or signal.SIGTERM)

    def __enter__(self) -> "Interruption":
        try:
            for number in _MESSAGES:
                self._previous[number] = signal.signal(number, self._request)
        except ValueError:  # not the main thread
            self._previous.clear()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader process inherits the handler; its parent decides
            return
        self._signal = number
        for other in _MESSAGES:
            signal.signal(other, signal.SIG_DFL)
        # Plain write: a handler may run in the middle of a buffered write to the same stream.
        text = f"\n{_MESSAGES[signal.Signals(number)]}: stopping after this step; once more ends at once\n"
        os.write(2, text.encode())


class AgreedStop:
    """Whether any process was asked to stop: called at the same step, every process gets the same answer.

    The CPUs agree on it through a gloo group of their own, so that no step has to wait for a GPU. Every process must
    build it, after the process group, and call it equally often.
    """

    def __init__(self, interruption: Interruption, ranks: "Ranks") -> None:
        self._interruption = interruption
        self._group: Any = None
        if ranks.distributed:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo")

    def __call__(self) -> bool:
        if self._group is None:
            return self._interruption.requested
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(self._interruption.requested)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)

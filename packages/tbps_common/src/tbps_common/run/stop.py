"""What ends a run early: Ctrl-C and SIGTERM, on which all processes agree, and a loss that is not a finite number."""

import os
import signal
from collections.abc import Callable
from datetime import timedelta
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a command that only catches signals needs no torch
    import torch
    from torch import Tensor

    from tbps_common.run.distributed import Ranks

_MESSAGES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Interruption:
    """Context in which the first signal only sets a flag: the run stops after its step. A second one has its usual effect.

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
        text = (
            f"\n{_MESSAGES[signal.Signals(number)]}: stopping after this step; press Ctrl-C again to quit immediately\n"
        )
        os.write(2, text.encode())


class AgreedStop:
    """Whether any process was asked to stop: called at the same step, every process gets the same answer.

    The CPUs agree on it through a gloo group of their own, so that no step has to wait for a GPU. Every process must
    build it, after the process group, and call it equally often.

    Args:
        interruption: of this process.
        ranks: place of this process.
        timeout_minutes: how long to wait for a process that does not come.
    """

    def __init__(self, interruption: Interruption, ranks: "Ranks", timeout_minutes: float = 120) -> None:
        self._interruption = interruption
        self._group: Any = None
        if ranks.distributed:
            import torch.distributed as dist

            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=timeout_minutes))

    def __call__(self) -> bool:
        if self._group is None:
            return self._interruption.requested
        import torch
        import torch.distributed as dist

        flag = torch.tensor([int(self._interruption.requested)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


class FiniteLoss:
    """Remembers the first step whose loss was NaN or infinite, without waiting for the device at every step.

    Args:
        device: where the losses are.
        sentence: step -> message of the error.
    """

    def __init__(self, device: "torch.device", sentence: Callable[[int], str]):
        import torch

        self._first = torch.zeros((), dtype=torch.int64, device=device)
        self._sentence = sentence

    def update(self, loss: "Tensor", step: int) -> None:
        """Note the scalar loss of step 1, 2, ...

        Raises:
            FloatingPointError: on a CPU, where looking costs nothing: the loss is not finite.
        """
        bad = loss.isfinite().logical_not() & (self._first == 0)
        self._first = self._first.masked_fill(bad, step)
        if self._first.device.type == "cpu":
            self.require()

    def require(self) -> None:
        """Look, before a log line or a save, whether all losses so far were finite; waits for the device.

        Raises:
            FloatingPointError: one was not.
        """
        step = int(self._first)
        if step:
            raise FloatingPointError(self._sentence(step))

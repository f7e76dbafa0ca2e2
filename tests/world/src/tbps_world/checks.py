"""What the tests of several packages check with."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def assert_same(one: Any, other: Any, where: str = "state") -> None:
    """Fail unless both are equal to the last bit, through all nesting of dicts, lists and tuples."""
    import torch

    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}[{key!r}]")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for number, (left, right) in enumerate(zip(one, other)):
            assert_same(left, right, f"{where}[{number}]")
    elif hasattr(one, "tolist"):
        assert one.tolist() == other.tolist(), where
    else:
        assert one == other, where


@contextmanager
def signal_at(logger_name: str, text: str, number: int) -> Iterator[None]:
    """Send a signal to this process as soon as a line of that logger contains `text`."""

    class Sender(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if text in record.getMessage():
                logger.removeHandler(self)
                os.kill(os.getpid(), number)

    logger, sender = logging.getLogger(logger_name), Sender()
    logger.addHandler(sender)
    try:
        yield
    finally:
        logger.removeHandler(sender)

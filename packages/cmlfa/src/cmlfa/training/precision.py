"""`--precision` in the training step."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch


class StepPrecision:
    """Autocast and gradient scaling of one training step; both do nothing unless the precision is `amp`.

    amp is bfloat16 where the device has it, which needs no scaling, and else float16 with a gradient scaler.
    """

    def __init__(self, precision: str, device: torch.device):
        self._autocast: Callable[[], AbstractContextManager[object]] = nullcontext
        self._scaler: torch.amp.GradScaler | None = None
        if precision == "amp":
            use_bfloat16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if use_bfloat16 else torch.float16
            self._autocast = lambda: torch.autocast(device_type=device.type, dtype=dtype)
            if not use_bfloat16:
                self._scaler = torch.amp.GradScaler(device.type)
            logging.getLogger("IRRA.train").info("amp computes in %s", str(dtype).removeprefix("torch."))

    def autocast(self) -> AbstractContextManager[object]:
        """Context of the forward pass."""
        return self._autocast()

    def backward_and_step(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Gradients of `loss`, then one step; a scaler leaves out a step whose gradients overflow."""
        if self._scaler is None:
            loss.backward()
            optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.step(optimizer)
            self._scaler.update()

    def state_dict(self) -> dict[str, object]:
        """State of the gradient scaler; empty without one."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on with the scale of `state_dict`."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)

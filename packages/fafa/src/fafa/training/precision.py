"""`--amp-dtype` in the training step: autocast, and gradient scaling where float16 needs it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class StepPrecision:
    """Autocast and gradient scaling of one training step.

    Args:
        name: `fp16` (with a gradient scaler; float32 on a CPU), `bf16` or `fp32`.
        device: where the step computes.
    """

    def __init__(self, name: str, device: torch.device):
        self.name = "fp32" if name == "fp16" and device.type == "cpu" else name
        self._device_type = device.type
        self._scaler = torch.amp.GradScaler(device.type) if self.name == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass and the sum of the losses."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self._device_type, dtype=_DTYPES[self.name])

    def backward_and_step(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Gradients of `loss`, then one step; a scaler leaves out a step whose gradients overflow."""
        if self._scaler is None:
            loss.backward()
            optimizer.step()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.step(optimizer)
            self._scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """State of the gradient scaler; empty without one."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the scale of `state_dict`."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)

"""The precision of a training step: autocast, and gradient scaling where float16 needs it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


class StepPrecision:
    """Autocast and gradient scaling of one training step.

    Args:
        name: `fp32`; `bf16`; or `fp16`, which a CPU computes in float32.
        device: where the step computes.
        scale: use a gradient scaler; None: for `fp16` alone.
    """

    def __init__(self, name: str, device: torch.device, *, scale: bool | None = None):
        self.name = "fp32" if name == "fp16" and device.type == "cpu" else name
        self._device_type = device.type
        scaled = self.name == "fp16" if scale is None else scale
        self._scaler = torch.amp.GradScaler(device.type) if scaled else None

    @property
    def scaled(self) -> bool:
        """Whether there is a gradient scaler, which leaves out steps whose gradients are not finite."""
        return self._scaler is not None

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass and the losses."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self._device_type, dtype=_DTYPES[self.name])

    def backward_and_step(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer, *, watch: bool = False) -> bool:
        """Gradients of `loss`, then one step of `optimizer`.

        Args:
            loss: scalar.
            optimizer: its gradients must have been cleared.
            watch: find out whether the scaler left the step out, which waits for the device.

        Returns:
            False if the step was watched and left out.
        """
        if self._scaler is None:
            loss.backward()
            optimizer.step()
            return True
        before = self._scaler.get_scale() if watch else 0.0
        self._scaler.scale(loss).backward()
        self._scaler.step(optimizer)
        self._scaler.update()
        return not watch or self._scaler.get_scale() >= before

    def state_dict(self) -> dict[str, Any]:
        """State of the gradient scaler; empty without one."""
        return self._scaler.state_dict() if self._scaler is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the scale of `state_dict`."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(state)

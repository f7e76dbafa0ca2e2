"""One training step, and the noting of what it found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fafa.training.precision import StepPrecision


@dataclass
class Step:
    """A training step: losses, backward pass, optimizer, schedule.

    Attributes:
        network: the model, or the model as DistributedDataParallel wraps it.
        optimizer: of the trainable parameters.
        scheduler: stepped after every step, also after one that the gradient scaler left out.
        precision: autocast and gradient scaling.
        device: where to compute.
        clean: the caption processor.
        weights: loss name -> weight; names that are absent count 1.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    precision: StepPrecision
    device: torch.device
    clean: Callable[[str], str]
    weights: Mapping[str, float]

    def __call__(self, batch: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Train on one batch of `fafa.data.collate_fn`.

        Returns:
            The losses by name, unweighted, and their weighted sum; detached, on the device.
        """
        reference, target, captions, group = batch
        samples = {
            "image": reference.to(self.device, non_blocking=True),
            "target": target.to(self.device, non_blocking=True),
            "text_input": [self.clean(caption) for caption in captions],
            "query_id": group,
        }
        self.optimizer.zero_grad(set_to_none=True)
        with self.precision.autocast():
            losses: dict[str, Tensor] = self.network(samples)
            total = torch.stack([value * self.weights.get(name, 1.0) for name, value in losses.items()]).sum()
        self.precision.backward_and_step(total, self.optimizer)
        self.scheduler.step()
        return {name: value.detach() for name, value in losses.items()}, total.detach()

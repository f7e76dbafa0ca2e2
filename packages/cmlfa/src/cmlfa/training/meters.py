"""Running averages of an epoch, kept on the device so that a training step never waits for the host."""

from collections.abc import Mapping

import torch
from torch import Tensor

# The order of a log line. `cmpm_loss` is not logged by the released code; it appears only where that loss is used.
METER_NAMES = (
    "loss",
    "sdm_loss",
    "itc_loss",
    "id_loss",
    "mlm_loss",
    "cmpm_loss",
    "img_acc",
    "txt_acc",
    "mlm_acc",
)


class Meters:
    """Averages weighted by batch size; `mlm_acc` counts every batch once, as the released code does."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._weights: dict[str, int] = {}

    def update(self, values: Mapping[str, Tensor], batch_size: int) -> None:
        """Add the scalars of one step; names without a meter are left out."""
        for name in METER_NAMES:
            if name in values:
                weight = 1 if name == "mlm_acc" else batch_size
                added = values[name].detach().double() * weight
                self._sums[name] = self._sums[name] + added if name in self._sums else added
                self._weights[name] = self._weights.get(name, 0) + weight

    def averages(self) -> dict[str, float]:
        """Every average above zero, in the order of a log line; one transfer from the device for all of them."""
        names = [name for name in METER_NAMES if name in self._sums]
        if not names:
            return {}
        sums = torch.stack([self._sums[name] for name in names]).tolist()
        averages = {name: total / self._weights[name] for name, total in zip(names, sums)}
        return {name: value for name, value in averages.items() if value > 0}

    def state_dict(self) -> dict[str, dict[str, float]]:
        """Plain numbers, for the checkpoint of an interrupted epoch."""
        return {
            "sums": {name: float(total) for name, total in self._sums.items()},
            "weights": dict(self._weights),
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, float]], device: torch.device) -> None:
        """Go on from the numbers of `state_dict`."""
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=device) for name, total in state["sums"].items()
        }
        self._weights = {name: int(weight) for name, weight in state["weights"].items()}

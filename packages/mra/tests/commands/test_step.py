"""The training step, the schedule and the meters, without a model of any size."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mra.cli import retrieval_main
from mra.training.loop import Epoch, train_epoch
from mra.training.meters import Meters
from mra.training.outputs import log_line
from mra.training.step import Schedule, Step

SETTINGS = {"sched": "linear", "epochs": 2, "num_warmup_steps": 2}


class Network(nn.Module):
    """Four losses of one weight; `scale` makes them infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(1.0))

    def forward(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        losses = [self.weight * factor * scale for factor in (1.0, 2.0, 3.0, 10.0)]
        return losses[0], losses[1], losses[2], losses[3]


def make_step(region: float = 0.0) -> Step:
    network = Network()
    optimizer = torch.optim.SGD([{"params": [network.weight], "lr": 0.1}], lr=0.1)
    return Step(network, optimizer, Schedule(optimizer, SETTINGS, 4), torch.device("cpu"), region)


def test_total_is_the_weighted_sum_and_the_rate_is_that_of_the_next_step() -> None:
    step = make_step(region=0.5)
    assert step.meter_names == ["loss_itc", "loss_itm", "loss_mlm", "loss_region", "loss"]
    losses = step({"scale": torch.tensor(1.0)})
    assert {name: float(value) for name, value in losses.items()} == {
        **{"loss_itc": 1, "loss_itm": 2, "loss_mlm": 3, "loss_region": 10, "loss": 11}
    }
    assert float(step.network.weight.detach()) == 1.0  # the first step of a warm-up has the rate 0
    assert step.optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    step({"scale": torch.tensor(1.0)})
    assert float(step.network.weight.detach()) == pytest.approx(1 - 0.05 * 11)
    rates = []
    for _ in range(6):
        rates.append(step.optimizer.param_groups[0]["lr"])
        step({"scale": torch.tensor(0.0)})
    assert rates == pytest.approx([0.1 * (8 - done) / 6 for done in range(2, 8)])
    assert step.optimizer.param_groups[0]["lr"] == 0
    assert make_step().meter_names == ["loss_itc", "loss_itm", "loss_mlm", "loss"]


def test_schedule_goes_on_where_a_run_stopped() -> None:
    whole, resumed = make_step(), make_step()
    for _ in range(3):
        whole.schedule.step()
    resumed.schedule.go_to(3)
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_step_with_infinite_gradients_is_left_out_under_the_scaler(caplog: pytest.LogCaptureFixture) -> None:
    """The scaler of the GPU, on the CPU."""
    step = make_step()
    step.scaler = torch.amp.GradScaler("cpu")
    step.schedule.go_to(2)
    with caplog.at_level(logging.WARNING):
        step({"scale": torch.tensor(float("inf"))})
    assert float(step.network.weight.detach()) == 1.0 and step.schedule.done == 2
    assert "left out" in caplog.text
    step({"scale": torch.tensor(1.0)})
    assert float(step.network.weight.detach()) == pytest.approx(1 - 0.1 * 6) and step.schedule.done == 3
    with pytest.raises(FloatingPointError, match="100 steps in a row"):
        for _ in range(100):
            step({"scale": torch.tensor(float("nan"))})


def test_loss_that_is_not_finite_stops_the_epoch_on_the_cpu() -> None:
    step = make_step()
    batches = [{"scale": torch.tensor(value)} for value in (1.0, float("nan"), 1.0)]
    meters, epoch = Meters(step.meter_names, step.device), Epoch(0, 3)
    with pytest.raises(FloatingPointError, match=r"epoch 0, iteration 1; nothing yet; a lower --lr"):
        train_epoch(
            batches,
            step,
            meters,
            epoch,
            log_every=10,
            save_every=0,
            save=lambda: None,
            stop_requested=lambda: False,
            last_good=lambda: "nothing yet",
        )


def test_epoch_saves_between_steps_and_stops_after_one() -> None:
    step, saved = make_step(), []
    batches = [{"scale": torch.tensor(1.0)}] * 7
    meters, epoch = Meters(step.meter_names, step.device), Epoch(0, 7)
    done = train_epoch(
        batches,
        step,
        meters,
        epoch,
        log_every=10,
        save_every=2,
        save=lambda: saved.append(epoch.done),
        stop_requested=lambda: epoch.done == 5,
        last_good=str,
    )
    assert not done and epoch.done == 5 and saved == [2, 4]


def test_meters_average_and_go_on_from_their_state() -> None:
    names = ["loss_itc", "loss"]
    whole, first = Meters(names, torch.device("cpu")), Meters(names, torch.device("cpu"))
    for number in range(4):
        losses = {"loss": torch.tensor(2.0 * number), "loss_itc": torch.tensor(1.0 + number)}
        whole.update(losses, 0.1 * number)
        if number < 2:
            first.update(losses, 0.1 * number)
    second = Meters(names, torch.device("cpu"))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for number in (2, 3):
        second.update({"loss": torch.tensor(2.0 * number), "loss_itc": torch.tensor(1.0 + number)}, 0.1 * number)
    assert whole.averages() == second.averages() == {"lr": pytest.approx(0.15), "loss_itc": 2.5, "loss": 3.0}
    assert whole.latest() == "lr: 0.300000  loss_itc: 4.0000  loss: 6.0000"


def test_log_line_has_the_released_form() -> None:
    metrics = {"R1": 70.0999, "R5": 86.25, "R10": 91.0, "mAP": 62.4004, "mINP": 45.9, "mFR": 3.0}
    averages = {"lr": 0.00005, "loss_itc": 1.9, "loss_itm": 0.512343, "loss_mlm": 1.7, "loss": 4.100004}
    assert log_line(0, metrics, averages) == (
        '{"epo": "0", "R1": "70.1", "R5": "86.25", "R10": "91.0", "mAP": "62.4", "mINP": "45.9", "lr": "5e-05", '
        '"loss_itc": "1.9", "loss_itm": "0.51234", "loss_mlm": "1.7", "loss": "4.1"}'
    )


def test_trusted_checkpoint_may_hold_other_objects(
    in_world: Path, tmp_path: Path, flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    stored = torch.load("data/checkpoint/ft_cuhk.pth", weights_only=True)
    torch.save({**stored, "folder": Path("here")}, tmp_path / "odd.pth")
    more = ["--evaluate", "--checkpoint", str(tmp_path / "odd.pth")]
    assert retrieval_main(flags("cuhk", tmp_path / "out", *more)) == 2
    assert "--trust" in capsys.readouterr().err
    assert retrieval_main(flags("cuhk", tmp_path / "out", *more, "--trust_checkpoint")) == 0

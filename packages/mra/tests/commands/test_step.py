"""The step, the schedule and the lines of a training."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mra import train as train_module
from mra.cli import retrieval_main
from mra.optimizer import Schedule
from mra.train import log_line
from tbps_common.run.precision import StepPrecision

Flags = Callable[..., list[str]]


def test_schedule_multiplies_the_rate_of_every_group() -> None:
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight], "lr": lr} for weight, lr in zip(weights, (0.1, 0.2))])
    schedule = Schedule(optimizer, {"sched": "linear", "epochs": 2, "num_warmup_steps": 2}, 4)
    rates = []
    for done in range(9):
        schedule.set_rates(done)
        rates.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(2 * rates[-1])
    assert rates == pytest.approx([0, 0.05, *(0.1 * (8 - done) / 6 for done in range(2, 9))])


@pytest.fixture
def without_a_number(in_world: Path, tmp_path: Path) -> Path:
    """Start weights with which every loss and gradient is NaN."""
    stored = torch.load("data/checkpoint/pretrain.pth", weights_only=True)
    stored["model"]["temp"].fill_(float("nan"))
    torch.save(stored, tmp_path / "nan.pth")
    return tmp_path / "nan.pth"


def test_steps_that_are_not_finite_are_left_out_under_the_scaler_until_there_are_too_many(
    without_a_number: Path,
    tmp_path: Path,
    flags: Flags,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The scaler of the GPU, on the CPU."""

    def scaled(name: str, device: torch.device, **_: Any) -> StepPrecision:
        return StepPrecision(name, device, scale=True)

    monkeypatch.setattr(train_module, "StepPrecision", scaled)
    monkeypatch.setattr(train_module, "LEFT_OUT_AT_MOST", 3)
    out = tmp_path / "out"
    more = ["--checkpoint", str(without_a_number), "--save_every", "2"]
    assert retrieval_main(flags("cuhk", out, *more)) == 1
    captured = capsys.readouterr()
    assert [
        captured.out.count(f"left out, because its gradients are not finite ({n} in a row)") for n in (1, 2, 3)
    ] == [*(1, 1, 1)]
    assert "the gradients of 3 steps in a row are not finite" in captured.err
    state = torch.load(out / "last.pth", weights_only=True)
    assert state["progress"]["batch"] == 2 and state["progress"]["steps"] == 0  # the schedule has not moved
    assert state["scaler"]["scale"] == 2.0**14  # halved twice
    before = torch.load(without_a_number, weights_only=True)["model"]
    assert torch.equal(state["model"]["itm_head.0.weight"], before["itm_head.0.weight"])


def test_error_of_a_loss_that_becomes_infinite_names_the_last_good_state(
    in_world: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert retrieval_main(flags("cuhk", out, "--lr", "1e30", "--save_every", "1")) == 1
    error = capsys.readouterr().err
    assert "not a finite number in epoch 0, iteration 2; the last good state is" in error
    assert str(out / "last.pth") in error
    assert torch.load(out / "last.pth", weights_only=True)["progress"]["batch"] == 2


def test_log_line_has_the_released_form() -> None:
    metrics = {"R1": 70.0999, "R5": 86.25, "R10": 91.0, "mAP": 62.4004, "mINP": 45.9, "mFR": 3.0}
    averages = {"lr": 0.00005, "loss_itc": 1.9, "loss_itm": 0.512343, "loss_mlm": 1.7, "loss": 4.100004}
    assert log_line(0, metrics, averages) == (
        '{"epo": "0", "R1": "70.1", "R5": "86.25", "R10": "91.0", "mAP": "62.4", "mINP": "45.9", "lr": "5e-05", '
        '"loss_itc": "1.9", "loss_itm": "0.51234", "loss_mlm": "1.7", "loss": "4.1"}'
    )


def test_trusted_checkpoint_may_hold_other_objects(
    in_world: Path, tmp_path: Path, flags: Flags, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = torch.load("data/checkpoint/ft_cuhk.pth", weights_only=True)
    torch.save({**stored, "folder": Path("here")}, tmp_path / "odd.pth")
    more = ["--evaluate", "--checkpoint", str(tmp_path / "odd.pth")]
    assert retrieval_main(flags("cuhk", tmp_path / "out", *more)) == 2
    assert "--trust" in capsys.readouterr().err
    assert retrieval_main(flags("cuhk", tmp_path / "out", *more, "--trust_checkpoint")) == 0

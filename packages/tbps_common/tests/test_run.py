"""What a training command is made of: meters, precision, the guard against losses that are not finite, states, sessions."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tbps_common.errors import CheckpointError, InputError
from tbps_common.files import new_run_folder
from tbps_common.run.checkpoint import load_checkpoint_file
from tbps_common.run.device import allow_tf32
from tbps_common.run.distributed import Ranks, gather_rows
from tbps_common.run.meters import Meters
from tbps_common.run.precision import StepPrecision
from tbps_common.run.randomness import set_rng_state
from tbps_common.run.session import training_run
from tbps_common.run.state import require_finite_weights, restore_state, save_state
from tbps_common.run.stop import FiniteLoss, Interruption

CPU = torch.device("cpu")


def test_meters_weigh_and_keep_the_order_of_names() -> None:
    meters = Meters()
    meters.update({"loss": torch.tensor(1.0), "lr": 0.5}, 2)
    meters.update({"loss": torch.tensor(4.0), "lr": 0.1}, 1)
    meters.update({"accuracy": torch.tensor(0.25)})
    assert meters.averages() == pytest.approx({"loss": 2.0, "lr": 1.1 / 3, "accuracy": 0.25})
    assert list(meters.averages()) == ["loss", "lr", "accuracy"]
    assert meters.latest() == pytest.approx({"loss": 4.0, "lr": 0.1, "accuracy": 0.25})
    assert meters.averages_of_all(CPU) == meters.averages()


def test_meters_go_on_to_the_bit() -> None:
    whole, first = Meters(), Meters()
    values = torch.randn(10, generator=torch.Generator().manual_seed(0))
    for value in values:
        whole.update({"loss": value}, 3)
    for value in values[:4]:
        first.update({"loss": value}, 3)
    second = Meters()
    second.load_state_dict(first.state_dict())
    for value in values[4:]:
        second.update({"loss": value}, 3)
    assert second.averages() == whole.averages()


@pytest.mark.parametrize(("name", "in_force", "dtype"), [("fp16", "fp32", None), ("bf16", "bf16", torch.bfloat16)])
def test_precision_on_a_cpu(name: str, in_force: str, dtype: torch.dtype | None) -> None:
    precision = StepPrecision(name, CPU)
    assert precision.name == in_force and not precision.scaled and precision.state_dict() == {}
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


def test_a_watched_step_under_a_scaler_says_when_it_was_left_out() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    precision = StepPrecision("bf16", CPU, scale=True)
    before = layer.weight.detach().clone()
    assert not precision.backward_and_step(layer(torch.full((1, 2), float("inf"))).sum(), optimizer, watch=True)
    assert torch.equal(layer.weight, before)
    optimizer.zero_grad()
    assert precision.backward_and_step(layer(torch.ones(1, 2)).sum(), optimizer, watch=True)
    assert not torch.equal(layer.weight, before)


def test_the_first_loss_that_is_not_finite_is_named_at_once_on_a_cpu() -> None:
    finite = FiniteLoss(CPU, lambda step: f"the loss is not a finite number at step {step}")
    finite.update(torch.tensor(1.0), 1)
    finite.require()
    with pytest.raises(FloatingPointError, match="at step 2"):
        finite.update(torch.tensor(float("nan")), 2)
    with pytest.raises(FloatingPointError, match="at step 2"):
        finite.require()


def _parts(seed: int) -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(seed)
    layer = nn.Linear(3, 2)
    return layer, torch.optim.AdamW(layer.parameters(), lr=1e-2)


def _step(layer: nn.Linear, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    layer(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()


def test_a_state_goes_on_to_the_bit(tmp_path: Path) -> None:
    layer, optimizer = _parts(0)
    _step(layer, optimizer)
    meters = Meters()
    meters.update({"loss": torch.tensor(2.0)})
    save_state(tmp_path / "last.pth", Ranks(), {"model": layer, "optimizer": optimizer}, meters=meters, epoch=3)
    _step(layer, optimizer)

    state = load_checkpoint_file(tmp_path / "last.pth")
    assert state["epoch"] == 3
    again, its_optimizer = _parts(1)
    restored = Meters()
    parts = {"model": again, "optimizer": its_optimizer}
    rng = restore_state(state, parts, Ranks(), source=tmp_path / "last.pth", meters=restored)
    assert rng is not None and restored.averages() == {"loss": 2.0}
    set_rng_state(rng)
    _step(again, its_optimizer)
    assert torch.equal(again.weight, layer.weight) and torch.equal(again.bias, layer.bias)


def test_a_state_of_other_processes_or_of_another_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layer, optimizer = _parts(0)
    path = tmp_path / "last.pth"
    save_state(path, Ranks(), {"model": layer})
    state = load_checkpoint_file(path)
    with caplog.at_level(logging.WARNING):
        assert restore_state(state, {"model": layer}, Ranks(1, 2, 1), source=path) is None
    assert "of 1 process(es), and this run has 2" in caplog.text
    with pytest.raises(CheckpointError, match=r"last\.pth does not fit this run \(entry optimizer"):
        restore_state(state, {"optimizer": optimizer}, Ranks(), source=path)
    with pytest.raises(CheckpointError, match=r"last\.pth does not fit this run \(entry model"):
        restore_state(state, {"model": nn.Linear(5, 5)}, Ranks(), source=path)


def test_weights_that_are_no_numbers_are_named() -> None:
    layer, _ = _parts(0)
    require_finite_weights(layer, "unused")
    with torch.no_grad():
        layer.bias[0] = float("inf")
    with pytest.raises(FloatingPointError, match=r"\(bias\), so they are not saved; the last good one is x"):
        require_finite_weights(layer, "the last good one is x")


def test_a_session_of_one_process(capfd: pytest.CaptureFixture[str]) -> None:
    with training_run("a.logger", device="cpu") as run:
        assert run.is_main and run.device == CPU and not run.stop_requested()
        layer = nn.Linear(1, 1)
        assert run.distribute(layer) is layer
        assert gather_rows(layer.weight) is layer.weight
        os.kill(os.getpid(), signal.SIGTERM)
        assert run.stop_requested() and run.exit_status == 143
    assert "stopping after this step" in capfd.readouterr().err


def test_a_session_says_what_ended_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError), training_run("a.logger", device="cpu"):
        raise InputError("the reason")
    assert "a.logger ERROR: the run ended: the reason" in capsys.readouterr().out


def test_batches_end_quietly_only_if_a_signal_ended_the_loader() -> None:
    def lost() -> object:
        yield 1
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated")

    with training_run("a.logger", device="cpu") as run:
        with pytest.raises(RuntimeError):
            list(run.load(lost()))  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(run.load(lost())) == [1]  # type: ignore[arg-type]


def test_signals_have_their_usual_effect_outside_the_run() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interruption() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        assert interruption.exit_status == 130
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the second signal ends the process
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_second_signal_ends_the_process_at_once() -> None:
    script = (
        "import time\nfrom tbps_common.run.stop import Interruption\n"
        "with Interruption() as interruption:\n"
        "    print('ready', flush=True)\n"
        "    while True: time.sleep(0.01)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stderr is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(signal.SIGTERM)
    child.stderr.readline()
    assert "stopping after this step" in child.stderr.readline()
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGTERM
    child.stdout.close()
    child.stderr.close()


def test_two_runs_within_a_second_get_folders_of_their_own(tmp_path: Path) -> None:
    first, second = (new_run_folder(tmp_path / "runs", "%Y%m%d_%H%M%S", "baseline") for _ in range(2))
    assert first != second
    assert sorted(tmp_path.glob("runs/*_baseline")) == sorted([first, second])


def test_a_run_counts_the_time_it_waits_for_data(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def loader() -> Iterator[int]:
        for batch in range(3):
            now[0] += 3
            yield batch

    monkeypatch.setattr("tbps_common.run.session.time", SimpleNamespace(perf_counter=lambda: now[0]))
    with training_run("a.logger", device="cpu") as run:
        for _ in range(2):  # every loop counts anew
            for _ in run.load(loader()):
                now[0] += 1
            assert run.waiting.seconds == 9
            assert run.waiting.share == 0.75


def test_tf32_is_allowed_only_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    products = SimpleNamespace(fp32_precision="ieee")
    monkeypatch.setattr("torch.backends.cuda.matmul", products)
    allow_tf32(False)
    assert products.fp32_precision == "ieee"
    allow_tf32(True)
    assert products.fp32_precision == "tf32"
    old = SimpleNamespace(allow_tf32=False)  # before torch 2.9
    monkeypatch.setattr("torch.backends.cuda.matmul", old)
    allow_tf32(True)
    assert old.allow_tf32

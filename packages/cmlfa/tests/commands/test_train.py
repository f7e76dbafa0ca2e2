"""The README's train command on a tiny world: what it writes, and that it trains as the recipe says."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cmlfa import build_model, get_args
from cmlfa.cli import train_main
from cmlfa.datasets import build_dataloader
from cmlfa.solver import build_lr_scheduler, build_optimizer
from cmlfa.train import shown_averages, update_meters
from tbps_common.run.meters import Meters
from tbps_common.run.randomness import seed_everything

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} \S+ [A-Z]+: ")


def test_run_directory_holds_what_the_released_code_writes(trained_run: Path, world: Path) -> None:
    assert re.fullmatch(r"\d{8}_\d{6}_cmlfa", trained_run.name)
    assert trained_run.parent.name == "CUHK-PEDES"
    names = {path.name for path in trained_run.iterdir()}
    assert {"configs.yaml", "train_log.txt", "last.pth", "best.pth"} <= names
    assert not [name for name in names if ".tmp" in name]
    config = yaml.safe_load((trained_run / "configs.yaml").read_text(encoding="utf-8"))
    assert config["output_dir"] == str(trained_run)
    assert config["root_dir"] == str(world)
    assert config["num_epoch"] == 2
    assert config["id_loss_weight"] == 0.5
    assert config["device"] == "cpu"


def test_log_lines_have_the_released_form(trained_run: Path) -> None:
    log = (trained_run / "train_log.txt").read_text(encoding="utf-8")
    assert all(LINE.match(line) or line.startswith(("+", "|", "CUHK-PEDES")) for line in log.splitlines())
    number = r"\d+\.\d{4}"
    assert re.search(
        rf"IRRA\.train INFO: Epoch\[2\] Iteration\[3/3\], loss: {number}, sdm_loss: {number}, itc_loss: {number}, "
        rf"id_loss: {number}, mlm_loss: {number}(, (img_acc|txt_acc|mlm_acc): {number})*, Base Lr: 2\.80e-06",
        log,
    )
    assert re.search(
        r"Epoch 1 done\. Time per batch: \d+\.\d{3}\[s\] Speed: \d+\.\d\[samples/s\] Waiting for data: \d+%", log
    )
    # The batch size stands beside the table, because the released model's scores depend on it.
    assert "Validation Results - Epoch: 2 (test split, batch size 8, lfa_attention batch)" in log
    assert re.search(r"IRRA\.eval INFO: \n\+-.*\n\| task \|\s+R1\s+\|\s+R5\s+\|\s+R10\s+\|\s+mAP\s+\|\s+mINP\s+\|", log)
    best = torch.load(trained_run / "last.pth", weights_only=True)
    assert f"best R1: {best['best_top1']} at epoch {best['best_epoch']}" in log
    assert re.search(r"Total params: \d+\.\dM", log)
    assert "computing on the CPU in fp32" in log


def test_tensorboard_has_one_point_per_epoch(trained_run: Path) -> None:
    events = EventAccumulator(str(trained_run)).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"lr", "temperature", "loss", "sdm_loss", "itc_loss", "id_loss", "mlm_loss", "eval/R1", "eval/mAP"} <= tags
    for tag in ("lr", "loss", "eval/R1"):
        assert [event.step for event in events.Scalars(tag)] == [1, 2]
    assert [event.value for event in events.Scalars("lr")] == pytest.approx([1e-6, 2.8e-6])
    assert events.Scalars("temperature")[0].value == pytest.approx(0.02)


def test_checkpoints_have_the_released_layout(trained_run: Path) -> None:
    best, last = (
        torch.load(trained_run / "best.pth", weights_only=True),
        torch.load(trained_run / "last.pth", weights_only=True),
    )
    layout = {"model", "optimizer", "scheduler", "num_epoch", "iteration", "epoch"}
    assert set(best) == layout
    assert set(last) == layout | {"best_top1", "best_epoch", "rng"}
    assert last["epoch"] == last["num_epoch"] == 2
    assert last["iteration"] == best["iteration"] == 0
    assert last["scheduler"]["last_epoch"] == 2  # saved after the schedule was stepped
    assert not any(name.startswith("module.") for name in last["model"])


@pytest.mark.parametrize("sampler", ["random", "identity"])
def test_run_equals_a_loop_written_by_hand(
    sampler: str, tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    """Same seed, same draws, same losses: the weights after an epoch are those of twelve lines of plain torch."""
    flags = train_flags(tmp_path, "--num_epoch", "1", "--sampler", sampler, "--seed", "5", "--optimizer", "AdamW")
    assert train_main([*flags, "--lr", "1e-3"]) == 0
    run = torch.load(only_run(tmp_path) / "last.pth", weights_only=True)

    args = get_args([*flags, "--lr", "1e-3"])
    seed_everything(5)
    loader, _, _, num_classes = build_dataloader(args)
    model = build_model(args, num_classes)
    optimizer = build_optimizer(args, model)
    scheduler = build_lr_scheduler(args, optimizer)
    model.train()
    for batch in loader:
        loss = sum(value for name, value in model(batch).items() if "loss" in name)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scheduler.step()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(run["model"][name], tensor, rtol=1e-5, atol=1e-7)
    assert run["scheduler"]["_last_lr"][0] == scheduler.get_last_lr()[0]


def test_no_improvement_still_ends_well(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--num_epoch", "1", "--eval_period", "2", "--val_dataset", "val")) == 0
    run = only_run(tmp_path)
    assert (run / "last.pth").is_file()
    assert not (run / "best.pth").exists()
    assert "there is no best.pth" in (run / "train_log.txt").read_text(encoding="utf-8")


def test_val_split_is_evaluated_when_asked_for(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--num_epoch", "1", "--val_dataset", "val")) == 0
    assert "Epoch: 1 (val split" in (only_run(tmp_path) / "train_log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("precision", ["amp", "fp32"])
def test_precisions_train_on_the_cpu(
    precision: str, tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--num_epoch", "1", "--precision", precision)) == 0
    state = torch.load(only_run(tmp_path) / "last.pth", weights_only=True)["model"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_missing_gpu_is_one_line_of_the_log(
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert train_main(train_flags(tmp_path, "--num_epoch", "1", "--device", "auto")) == 0
    log = (only_run(tmp_path) / "train_log.txt").read_text(encoding="utf-8")
    assert log.count("no GPU found: computing on the CPU in fp32") == 1


def test_dead_flags_are_accepted_with_a_warning(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--num_epoch", "1", "--masked_token_rate", "0.5")) == 0
    log = (only_run(tmp_path) / "train_log.txt").read_text(encoding="utf-8")
    assert "WARNING: --masked_token_rate has no effect" in log
    assert "--masked_token_unchanged_rate" not in log


def test_diverged_run_stops_and_names_the_last_good_checkpoint(
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The warm-up's first epoch has a learning rate of 0, so one epoch is good.
    diverging = ("--optimizer", "SGD", "--lr", "1e30", "--warmup_factor", "0")
    assert train_main(train_flags(tmp_path, *diverging)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    run = only_run(tmp_path)
    assert re.search(r"epoch 2, iteration \d \(base learning rate 2\.00e\+29\)", line)
    assert str(run / "last.pth") in line
    last = torch.load(run / "last.pth", weights_only=True)
    assert last["epoch"] == 1
    assert all(bool(tensor.isfinite().all()) for tensor in last["model"].values())


def test_meters_average_by_batch_size_but_mask_accuracy_by_batch() -> None:
    meters = Meters()
    first = {"loss": torch.tensor(1.0), "mlm_acc": torch.tensor(0.5), "img_acc": torch.tensor(0.0)}
    update_meters(meters, first, batch_size=4)
    second = {"loss": torch.tensor(4.0), "mlm_acc": torch.tensor(1.0), "temperature": torch.tensor(9.0)}
    update_meters(meters, second, batch_size=2)
    assert shown_averages(meters) == {"loss": 2.0, "mlm_acc": 0.75}  # averages of zero are not shown
    copied = Meters()
    copied.load_state_dict(meters.state_dict())
    for each in (meters, copied):
        update_meters(each, {"loss": torch.tensor(math.pi)}, batch_size=3)
    assert shown_averages(copied) == shown_averages(meters)

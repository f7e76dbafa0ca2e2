"""The README's training command on the toy: what it writes, and that it trains as the recipe says."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fafa.checkpoint import official_state_dict
from fafa.cli import train_main
from fafa.data import SynCPRDataset, collate_fn
from fafa.evaluation import Validator
from fafa.model import Blip2FAFACPR, read_model_config
from fafa.optim import build_optimizer, build_scheduler
from fafa.options import get_args
from fafa.processors import BlipCaptionProcessor
from fafa.transforms import squarepad_transform_train
from tbps_common.run.batches import EpochBatches, SeededItems
from tbps_common.run.randomness import seed_everything
from tbps_world.tiny.fafa import write_toy_data

RECORDED = """backbone batch_size blip_model_name exp_name fd_margin fda_alpha fda_k itcpr_root json_path learning_rate
loss_fd loss_fda loss_mfr num_epochs num_workers resume_path save_best save_last save_memory save_training setting
syncpr_data_path target_ratio transform validation_frequency validation_step""".split()


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_run_directory_holds_what_the_released_code_writes(trained_run: Path, toy: Path) -> None:
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d_toy", trained_run.name)
    names = {path.name for path in trained_run.iterdir()}
    assert {"training_hyperparameters.json", "train_metrics.csv", "saved_models", "model_config.yaml"} <= names
    assert {"validation_metrics_by_step.csv", "validation_metrics_by_epoch.csv", "train_log.txt", "vocab.txt"} <= names
    assert not list(trained_run.rglob("*.tmp*"))
    text = (trained_run / "training_hyperparameters.json").read_text(encoding="utf-8")
    recorded = json.loads(text)
    assert list(recorded) == RECORDED == sorted(RECORDED)
    assert text.splitlines()[1].startswith('    "backbone"')
    assert recorded["setting"] == ["annotations"]
    assert recorded["resume_path"] is None
    assert recorded["save_training"] is recorded["save_best"] is recorded["save_last"] is True
    assert recorded["learning_rate"] == 2e-6
    assert recorded["itcpr_root"] == str(toy / "itcpr")
    flags = json.loads((trained_run / "flags.json").read_text(encoding="utf-8"))
    assert flags["seed"] == 0
    assert set(recorded) <= set(flags)


def test_tables_count_epochs_and_steps_from_zero(trained_run: Path) -> None:
    losses = rows(trained_run / "train_metrics.csv")
    assert list(losses[0]) == ["epoch", "loss_fd", "loss_fda", "loss_mfr"]
    assert [row["epoch"] for row in losses] == ["0", "1"]
    assert all(float(row["loss_fda"]) > 1 for row in losses)
    by_step = rows(trained_run / "validation_metrics_by_step.csv")
    assert list(by_step[0]) == ["step", "recall_at1", "recall_at5", "recall_at10", "mAP"]
    assert [row["step"] for row in by_step] == ["3", "6"]
    by_epoch = rows(trained_run / "validation_metrics_by_epoch.csv")
    assert list(by_epoch[0]) == ["epoch", "recall_at1", "recall_at5", "recall_at10", "mAP"]
    assert [row["epoch"] for row in by_epoch] == ["0", "1"]
    assert all(row["recall_at5"] == "100.0" for row in by_step + by_epoch)  # percent; five gallery images


def test_checkpoints_have_the_released_layout(trained_run: Path, toy: Path) -> None:
    folder = trained_run / "saved_models"
    last = torch.load(folder / "tuned_last_recall_at1.pt", weights_only=True)
    assert list(last) == ["epoch", "model"]
    assert last["epoch"] == 1
    model = Blip2FAFACPR.from_pretrained(str(toy / "tiny.yaml"))
    assert list(last["model"]) == list(official_state_dict(model))


def test_log_shows_what_the_released_code_prints(trained_run: Path) -> None:
    log = (trained_run / "train_log.txt").read_text(encoding="utf-8")
    for text in (
        "save_memory = False",
        "fda_k = 6",
        "fda_alpha = 0.5",
        "fd_margin = 0.5",
        "Square pad preprocess pipeline is used",
        "| subset  | iids | images |",
        "| query   |    4 |      4 |",
        "| gallery |    5 |      5 |",
        "| task |   R1",
        '    "recall_at1": ',
        "computing on the CPU in fp32",
    ):
        assert text in log, text


def test_best_files_appear_with_the_first_hit_and_only_then(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    write_toy_data(tmp_path, one_instance=True)
    flags = train_flags(tmp_path / "out", "--itcpr-root", str(tmp_path / "itcpr"), "--validation-step", "5")
    assert train_main(flags) == 0
    folder = only_run(tmp_path / "out") / "saved_models"
    step, epoch = (torch.load(folder / f"tuned_recall_at1_{by}.pt", weights_only=True) for by in ("step", "epoch"))
    assert list(step) == ["step", "model"]
    assert step["step"] == 5
    assert list(epoch) == ["epoch", "model"]
    assert epoch["epoch"] == 0  # R@1 is 100 from the first validation on, and only a higher one would count


@pytest.mark.parametrize("more", [[], ["--save-best"], ["--save-last"]])
def test_nothing_is_saved_without_save_training(
    more: list[str], tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    flags = [flag for flag in train_flags(tmp_path) if flag not in ("--save-training", "--save-best", "--save-last")]
    assert train_main([*flags, *more, "--num-epochs", "1"]) == 0
    run = only_run(tmp_path)
    assert not (run / "saved_models").exists()
    log = (run / "train_log.txt").read_text(encoding="utf-8")
    assert "WARNING" in log
    assert "without --save-training" in log


def test_code_backup_holds_the_sources_and_nothing_else(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    flags = [flag for flag in train_flags(tmp_path, "--num-epochs", "1") if flag != "--no-code-backup"]
    assert train_main(flags) == 0
    backup = only_run(tmp_path) / "code_backup"
    assert {path.name for path in backup.iterdir()} == {"fafa", "tbps_common"}
    assert (backup / "fafa" / "train.py").is_file()
    assert not list(backup.rglob("__pycache__"))


def test_run_equals_a_loop_written_by_hand(
    tmp_path: Path, toy: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    """Same seed, same draws, same losses: the weights after two epochs are those of a few lines of plain torch."""
    flags = train_flags(tmp_path, "--seed", "5", "--learning-rate", "1e-3", "--loss-fda", "0.7", "--fda-k", "3")
    assert train_main(flags) == 0
    found = torch.load(only_run(tmp_path) / "saved_models" / "tuned_last_recall_at1.pt", weights_only=True)["model"]

    args = get_args(flags)
    seed_everything(5)
    model = Blip2FAFACPR.from_config(read_model_config(args.backbone)).train()
    model.fda_k = 3
    dataset = SynCPRDataset(toy / "syncpr", preprocess=squarepad_transform_train(28))
    batches = EpochBatches(len(dataset), 4, seed=5)
    optimizer = build_optimizer(model, 1e-3)
    scheduler = build_scheduler(optimizer, 1e-3, 4, 2)
    clean, items = BlipCaptionProcessor(), SeededItems(dataset)
    for epoch in range(2):
        batches.set_position(epoch)
        for keys in batches:
            image, target, captions, ids = collate_fn([items[key] for key in keys])
            texts = [clean(caption) for caption in captions]
            losses = model({"image": image, "target": target, "text_input": texts, "query_id": ids})
            loss = 0.7 * losses["loss_fda"] + losses["loss_fd"] + 0.5 * losses["loss_mfr"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
    expected = official_state_dict(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_worker_processes_do_not_change_the_numbers(
    tmp_path: Path, trained_run: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--num-workers", "1", "--eval-num-workers", "1")) == 0
    name = "train_metrics.csv"
    assert (only_run(tmp_path) / name).read_text() == (trained_run / name).read_text()


def test_cached_vit_outputs_do_not_change_the_numbers(
    tmp_path: Path, trained_run: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    cache = tmp_path / "cache"
    assert train_main(train_flags(tmp_path / "file", "--eval-cache-dir", str(cache))) == 0
    assert train_main(train_flags(tmp_path / "none", "--eval-cache-gb", "0")) == 0
    assert not list(cache.iterdir())
    for output in ("file", "none"):
        for name in ("validation_metrics_by_step.csv", "validation_metrics_by_epoch.csv"):
            assert (only_run(tmp_path / output) / name).read_text() == (trained_run / name).read_text()


def test_a_step_at_an_epochs_end_is_validated_once(
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []
    measure = Validator.measure
    monkeypatch.setattr(Validator, "measure", lambda self: calls.append(1) or measure(self))
    assert train_main(train_flags(tmp_path, "--validation-step", "7")) == 0  # the last of eight steps
    assert len(calls) == 2
    run = only_run(tmp_path)
    by_step, by_epoch = (rows(run / f"validation_metrics_by_{kind}.csv")[-1] for kind in ("step", "epoch"))
    assert by_step["mAP"] == by_epoch["mAP"]


@pytest.mark.parametrize("transform", ["targetpad", "resize"])
def test_other_transforms_train(
    transform: str, tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--transform", transform, "--num-epochs", "1")) == 0
    assert len(rows(only_run(tmp_path) / "train_metrics.csv")) == 1


def test_fifty_steps_have_a_schedule(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    """torch's OneCycleLR divides by zero for exactly 50 steps with this warm-up."""
    flags = train_flags(tmp_path, "--batch-size", "16", "--num-epochs", "50", "--max-steps", "2")
    assert train_main(flags) == 0
    assert len(rows(only_run(tmp_path) / "train_metrics.csv")) == 2


def test_max_steps_end_the_run_and_a_higher_limit_goes_on(
    tmp_path: Path, trained_run: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--max-steps", "6")) == 0
    run = only_run(tmp_path)
    short = rows(run / "train_metrics.csv")
    whole = rows(trained_run / "train_metrics.csv")
    assert short[0] == whole[0]
    assert len(short) == 2
    assert short[1] != whole[1]
    assert train_main(train_flags(tmp_path, "--resume", "auto")) == 0
    assert rows(run / "train_metrics.csv") == whole


def test_unreadable_triplets_are_left_out_and_counted(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    write_toy_data(tmp_path)
    damaged = tmp_path / "syncpr" / "test1" / "sub_img" / "img_left" / "3-0_left.png"
    damaged.write_bytes(b"no image")
    flags = train_flags(tmp_path / "out", "--syncpr-data-path", str(tmp_path / "syncpr"), "--num-epochs", "1")
    assert train_main(flags) == 0
    log = (only_run(tmp_path / "out") / "train_log.txt").read_text(encoding="utf-8")
    assert f"training triplet 3 is left out: The image {damaged} cannot be read" in log
    assert "1 triplets of this epoch could not be loaded" in log
    assert train_main([*flags, "--bad-images", "stop"]) != 0


def test_diverged_run_stops_and_says_where_it_can_go_on(
    tmp_path: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = train_flags(tmp_path, "--learning-rate", "1e30", "--save-state-every", "1", "--num-epochs", "5")
    with np.errstate(all="ignore"):
        assert train_main(flags) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "not a finite number" in line or "no longer finite" in line
    state = torch.load(only_run(tmp_path) / "training_state" / "last.pt", weights_only=True)
    assert all(bool(tensor.isfinite().all()) for tensor in state["model"].values() if tensor.is_floating_point())


def test_bf16_trains_on_the_cpu(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    assert train_main(train_flags(tmp_path, "--amp-dtype", "bf16", "--num-epochs", "1")) == 0
    log = (only_run(tmp_path) / "train_log.txt").read_text(encoding="utf-8")
    assert "computing on the CPU in bf16" in log


def test_weights_to_start_from_are_loaded(
    tmp_path: Path, trained_run: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    start = trained_run / "saved_models" / "tuned_last_recall_at1.pt"
    assert train_main(train_flags(tmp_path, "--resume-path", str(start), "--learning-rate", "1e-30")) == 0
    run = only_run(tmp_path)
    assert "0 keys missing, 0 unexpected" in (run / "train_log.txt").read_text(encoding="utf-8")
    before = torch.load(start, weights_only=True)["model"]
    after = torch.load(run / "saved_models" / start.name, weights_only=True)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_trained_model_is_tuned_on_ones_own_data(
    tmp_path: Path, trained_run: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    """The README's way: the model file and the weights of a run, other data, a run of its own."""
    write_toy_data(tmp_path / "own", one_instance=True)
    before = {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}
    weights = trained_run / "saved_models" / "tuned_last_recall_at1.pt"
    flags = train_flags(
        tmp_path / "out",
        *("--syncpr-data-path", str(tmp_path / "own" / "syncpr"), "--itcpr-root", str(tmp_path / "own" / "itcpr")),
        *("--backbone", str(trained_run / "model_config.yaml"), "--resume-path", str(weights), "--num-epochs", "1"),
    )
    assert train_main(flags) == 0
    run = only_run(tmp_path / "out")
    assert "0 keys missing, 0 unexpected" in (run / "train_log.txt").read_text(encoding="utf-8")
    assert (run / "saved_models" / "tuned_recall_at1_epoch.pt").is_file()  # 100 % on data with one identity
    assert before == {path: path.read_bytes() for path in trained_run.rglob("*") if path.is_file()}

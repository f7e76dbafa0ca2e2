"""Training: what is printed and written, in the released formats."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mra import Retrieval, load_config
from mra.cli import retrieval_main

METRICS = ["R1", "R5", "R10", "mAP", "mINP"]


def test_finetuning_writes_the_released_files(trained: Path, world: Path) -> None:
    assert {path.name for path in trained.iterdir()} == {
        *("config.yaml", "log.txt", "checkpoint_best.pth"),
        *("last.pth", "run.log"),  # ours
    }
    stored = torch.load(trained / "checkpoint_best.pth", weights_only=True)
    assert set(stored) == {"model", "config"}
    assert stored["config"] == load_config(world / "configs" / "cuhk.yaml")
    assert load_config(trained / "config.yaml") == stored["config"]


def test_log_holds_one_object_of_strings_per_epoch(trained: Path) -> None:
    text = (trained / "log.txt").read_text(encoding="utf-8")
    *lines, last = text.split("\n")
    assert len(lines) == 2
    for epoch, line in enumerate(lines):
        entry = json.loads(line)
        assert list(entry) == ["epo", *METRICS, "lr", "loss_itc", "loss_itm", "loss_mlm", "loss"]
        assert all(type(value) is str for value in entry.values())
        assert entry["epo"] == str(epoch)
        for name, value in entry.items():
            if name != "epo":
                assert value == str(round(float(value), 3 if name in METRICS else 5))
        parts = sum(float(entry[name]) for name in ("loss_itc", "loss_itm", "loss_mlm"))
        assert float(entry["loss"]) == pytest.approx(parts, abs=3e-5)
    scores = [float(json.loads(line)["R1"]) for line in lines]
    assert last == f"best epoch: {scores.index(max(scores))}"


def test_console_shows_iterations_and_the_table_of_all_epochs(
    in_world: Path, tmp_path: Path, flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert retrieval_main(flags("cuhk", tmp_path / "out", "--log_every", "4")) == 0
    shown = capsys.readouterr().out
    meters = r"lr: \d\.\d{6}  loss_itc: \d+\.\d{4}  loss_itm: \d+\.\d{4}  loss_mlm: \d+\.\d{4}  loss: \d+\.\d{4}"
    found = re.findall(
        rf"Train Epoch: \[1\]  \[ *(\d+)/6\]  eta: [\d:]+  {meters}  time: [\d.]+  data: [\d.]+ \(\d+%\)\n", shown
    )
    assert found == ["0", "4", "5"]
    tables = re.findall(r"\| epoch \|.*?\n(?:.*\n)(?:\| +\d .*\n)+", shown)
    assert [table.count("\n") - 2 for table in tables] == [1, 2]
    assert re.search(r"\| +1 +\|( +\d+\.\d{3} +\|){5}", tables[1])
    assert "number of trainable parameters: " in shown
    assert "released code" in shown  # the best epoch is chosen on the test split


@pytest.mark.parametrize("task", ["sda", "icfg", "rstp"])
def test_other_tasks_train_and_their_checkpoints_load_strictly(
    task: str, in_world: Path, tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    assert retrieval_main(flags(task, tmp_path / "out", "--epo", "1", "--lr", "5e-4", "--bs", "24")) == 0
    entry = json.loads((tmp_path / "out" / "log.txt").read_text(encoding="utf-8").splitlines()[0])
    assert ("loss_region" in entry) == (task == "sda")
    if task == "sda":
        names = list(entry)
        assert names.index("loss_region") == names.index("loss_mlm") + 1 == names.index("loss") - 1
        parts = [float(entry[f"loss_{name}"]) for name in ("itc", "itm", "mlm", "region")]
        assert float(entry["loss"]) == pytest.approx(sum(parts[:3]) + 0.8 * parts[3], abs=5e-5)
        assert not (tmp_path / "out" / "checkpoint_best.pth").exists()
    name = "checkpoint_0.pth" if task == "sda" else "checkpoint_best.pth"
    stored = torch.load(tmp_path / "out" / name, weights_only=True)
    assert stored["config"]["optimizer"]["lr"] == stored["config"]["schedular"]["lr"] == 5e-4
    assert stored["config"]["batch_size_train"] == 24 and stored["config"]["schedular"]["epochs"] == 1
    assert load_config(tmp_path / "out" / "config.yaml")["batch_size_train"] == 16  # the file without the flags
    Retrieval(stored["config"], init_backbones=False).load_state_dict(stored["model"], strict=True)


def test_selection_on_the_validation_split_is_told_and_used(
    in_world: Path, tmp_path: Path, flags: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the learning rate 0 but for rounding, the score of the epoch is that of the start weights on that split."""
    scores = {}
    for split in ("val", "test"):
        folder = tmp_path / split
        assert retrieval_main(flags("cuhk", folder, "--epo", "1", "--lr", "1e-30", "--select", split)) == 0
        assert ("released code" in capsys.readouterr().out) == (split == "test")
        scores[split] = json.loads((folder / "log.txt").read_text(encoding="utf-8").splitlines()[0])
        evaluated = flags("cuhk", tmp_path / "evaluated", "--evaluate", "--checkpoint", str(folder / "last.pth"))
        assert retrieval_main(evaluated) == 0
        shown = capsys.readouterr().out
        table = shown[shown.index(f"### {split}_result:") :].splitlines()
        numbers = [float(cell) for cell in table[4].strip("|").split("|")[1:]]
        assert numbers == [float(scores[split][name]) for name in METRICS]
    assert scores["val"] != scores["test"]


def test_region_features_of_the_paper_change_the_region_loss_only_at_first(
    in_world: Path, tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    entries = []
    for kind in ("released", "paper"):
        more = ["--epo", "1", "--lr", "1e-30", "--region_feat", kind]
        assert retrieval_main(flags("sda", tmp_path / kind, *more)) == 0
        entries.append(json.loads((tmp_path / kind / "log.txt").read_text(encoding="utf-8").splitlines()[0]))
    released, paper = entries
    assert released["loss_region"] != paper["loss_region"]
    assert released["loss_mlm"] == paper["loss_mlm"]


def test_gradient_checkpointing_gives_the_same_losses(
    trained: Path, in_world: Path, tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    assert retrieval_main(flags("cuhk", tmp_path / "out", "--gradient_checkpointing", "--epo", "1")) == 0
    # The schedule of one epoch differs from that of two, but not in the warm-up step that comes first.
    logs = [(folder / "run.log").read_text(encoding="utf-8") for folder in (trained, tmp_path / "out")]
    first = [re.findall(r"loss: (\d+\.\d+)", log)[0] for log in logs]
    assert first[0] == first[1]


def test_loader_processes_do_not_change_the_run(
    trained: Path, in_world: Path, tmp_path: Path, flags: Callable[..., list[str]]
) -> None:
    assert retrieval_main(flags("cuhk", tmp_path / "out", "--num_workers", "2")) == 0
    assert (tmp_path / "out" / "log.txt").read_text() == (trained / "log.txt").read_text()

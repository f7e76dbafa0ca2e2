"""Several processes: one run, one set of files, and the numbers that one process gives."""

import csv
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fafa.cli import train_main

PACKAGE = Path(__file__).resolve().parents[2]


SCRIPT = PACKAGE / "src" / "blip_fine_tune_new.py"

EVALUATION = """
import sys

import torch
import torch.distributed as dist

from fafa.evaluation import itcpr_sets, retrieval
from fafa.features import Extractor
from fafa.model import Blip2FAFACPR
from fafa.transforms import squarepad_transform_test
from tbps_common.datasets import ITCPR
from tbps_common.run.distributed import process_group

toy, out = sys.argv[1:]
with process_group(torch.device("cpu"), timeout_minutes=5) as ranks:
    torch.manual_seed(0)
    model = Blip2FAFACPR.from_pretrained(f"{toy}/tiny.yaml")
    query_set, gallery_set = itcpr_sets(ITCPR(f"{toy}/itcpr"), squarepad_transform_test(28))
    extractor = Extractor(model, batch_size=2, num_workers=0, ranks=ranks)
    queries, gallery = extractor.queries(query_set, query_set.captions), extractor.gallery(gallery_set)
    own = extractor.own_part(len(gallery_set))
    group = dist.group.WORLD if ranks.distributed else None
    q_ids, g_ids = torch.tensor(query_set.instance_ids), torch.tensor(gallery_set.instance_ids)
    result = retrieval(queries, gallery, q_ids, g_ids[own], k=6, topk=5, group=group)
    found = {"queries": queries, "gallery": gallery, "indices": result.indices, "scores": result.scores}
    torch.save({**found, "metrics": result.metrics}, f"{out}/{ranks.world_size}.{ranks.rank}.pt")
"""


def torchrun(flags: list[str], script: Path = SCRIPT, processes: int = 2) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, str(script), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=540,
    )


def table(run: Path, name: str) -> list[dict[str, float]]:
    with open(run / name, encoding="utf-8", newline="") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_two_processes_of_half_the_batch_equal_one_when_losses_are_gathered(
    tmp_path: Path,
    calm_model: Path,
    train_flags: Callable[..., list[str]],
    only_run: Callable[[Path], Path],
) -> None:
    """Without drop-out, DSU and MFR's masks nothing is random but the order, which is the same."""
    # ReLU's kink and Adam's division make single weights sensitive to rounding, so a few steps are compared.
    common = ("--backbone", str(calm_model), "--bad-images", "stop", "--gather", "--learning-rate", "1e-3")
    assert train_main(train_flags(tmp_path / "one", *common, "--batch-size", "8")) == 0
    done = torchrun(train_flags(tmp_path / "two", *common, "--batch-size", "4"))
    assert done.returncode == 0, done.stderr
    one, two = only_run(tmp_path / "one"), only_run(tmp_path / "two")
    for name in ("train_metrics.csv", "validation_metrics_by_epoch.csv"):
        expected, found = table(one, name), table(two, name)
        assert len(expected) == len(found) == 2
        for left, right in zip(expected, found):
            assert right == pytest.approx(left, rel=1e-4)
    weights = [
        torch.load(run / "saved_models" / "tuned_last_recall_at1.pt", weights_only=True)["model"] for run in (one, two)
    ]
    for name, tensor in weights[0].items():
        torch.testing.assert_close(weights[1][name], tensor, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.slow
def test_two_processes_resume_and_write_one_run(
    tmp_path: Path, train_flags: Callable[..., list[str]], only_run: Callable[[Path], Path]
) -> None:
    """Losses are each process's own by default; a run that is stopped and one that is not end in the same bits."""
    flags = ["--batch-size", "4", "--num-epochs", "3", "--save-state-every", "1"]
    done = torchrun(train_flags(tmp_path / "whole", *flags))
    assert done.returncode == 0, done.stderr
    done = torchrun(train_flags(tmp_path / "parts", *flags, "--max-steps", "3"))
    assert done.returncode == 0, done.stderr
    done = torchrun(train_flags(tmp_path / "parts", *flags, "--resume", "auto"))
    assert done.returncode == 0, done.stderr
    whole, parts = only_run(tmp_path / "whole"), only_run(tmp_path / "parts")
    assert "2 process(es)" in (whole / "train_log.txt").read_text(encoding="utf-8")
    left, right = (torch.load(run / "training_state" / "last.pt", weights_only=True) for run in (whole, parts))
    assert len(left["rng"]) == 2
    assert not torch.equal(left["rng"][0]["torch"], left["rng"][1]["torch"])
    assert left["model"].keys() == right["model"].keys()
    for name, tensor in left["model"].items():
        assert torch.equal(tensor, right["model"][name]), name
    assert table(whole, "train_metrics.csv") == table(parts, "train_metrics.csv")
    # Resuming with another number of processes would change the batches.
    assert train_main(train_flags(tmp_path / "parts", *flags, "--resume", "auto")) == 2


@pytest.mark.slow
def test_an_evaluation_does_not_depend_on_the_number_of_processes(
    tmp_path: Path, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process holds the whole gallery; with three, one of them has no query to encode."""
    script = tmp_path / "evaluation.py"
    script.write_text(EVALUATION, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", [str(script), str(toy), str(tmp_path)])
    runpy.run_path(str(script))
    for processes in (2, 3):
        done = torchrun([str(toy), str(tmp_path)], script, processes)
        assert done.returncode == 0, done.stderr
    alone = torch.load(tmp_path / "1.0.pt", weights_only=True)
    assert alone["indices"].shape == (4, 5)
    for processes in (2, 3):
        parts = [torch.load(tmp_path / f"{processes}.{rank}.pt", weights_only=True) for rank in range(processes)]
        assert all(len(part["gallery"]) < len(alone["gallery"]) for part in parts)
        assert torch.equal(torch.cat([part["gallery"] for part in parts]), alone["gallery"])
        for part in parts:
            assert torch.equal(part["queries"], alone["queries"])
            assert part["metrics"] == alone["metrics"]
            assert torch.equal(part["indices"], alone["indices"])
            torch.testing.assert_close(part["scores"], alone["scores"], rtol=0, atol=0)

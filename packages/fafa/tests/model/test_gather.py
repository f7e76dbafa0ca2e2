"""Losses over the rows of all processes: two gloo processes do together what one does alone."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fafa import Blip2FAFACPR

WORKER = """
import json, sys, torch
from fafa import Blip2FAFACPR
from tbps_common.run.distributed import process_group
from tbps_common.run.session import Run

torch.set_num_threads(1)
folder = sys.argv[1]
work = torch.load(f"{folder}/work.pt", weights_only=True)
with process_group(torch.device("cpu"), timeout_minutes=2) as ranks:
    model = Blip2FAFACPR.from_config(json.load(open(f"{folder}/model.json", encoding="utf-8")))
    model.load_state_dict(work["weights"])
    model.gather = True
    run = Run(ranks, torch.device("cpu"), None, None, None)
    wrapped = run.distribute(model.train(), unused=model.unused_parameters)
    own = slice(2 * ranks.rank, 2 * ranks.rank + 2)
    samples = {name: value[own] for name, value in work["batch"].items()}
    found = {}
    for case, draws in work["draws"].items():
        torch.manual_seed(ranks.rank)  # what a process draws itself would differ
        model.zero_grad()
        losses = wrapped(samples, draws=draws)
        sum(losses.values()).backward()
        found[case] = {
            "losses": {name: loss.detach() for name, loss in losses.items()},
            "grads": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        }
    torch.save(found, f"{folder}/found{ranks.rank}.pt")
"""


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_two_processes_give_the_losses_and_gradients_of_one(
    tmp_path: Path, port: int, tiny_mapping: Callable[..., dict[str, Any]], batch: dict[str, Any]
) -> None:
    mapping = tiny_mapping(fd_sample_size=9, freeze_vit=False)
    torch.manual_seed(0)
    model = Blip2FAFACPR.from_config(mapping).train()
    generator = torch.Generator().manual_seed(2)
    draws = {
        "dsu_gate": 0.1,
        "dsu_eps_beta": torch.randn(5, 32, generator=generator),
        "dsu_eps_gamma": torch.randn(5, 32, generator=generator),
        "fd_indices": torch.randperm(20, generator=generator)[:9],
        "mfr_mask_A": (torch.rand(4, 32, generator=generator) < 0.3).float(),
        "mfr_mask_B": (torch.rand(4, 32, generator=generator) < 0.3).float(),
    }
    work = {"weights": model.state_dict(), "batch": batch, "draws": {"given": draws, "drawn": {}}}
    torch.save(work, tmp_path / "work.pt")
    (tmp_path / "model.json").write_text(json.dumps(mapping), encoding="utf-8")
    (tmp_path / "worker.py").write_text(WORKER, encoding="utf-8")
    run_pair(tmp_path, port)

    first, second = (torch.load(tmp_path / f"found{rank}.pt", weights_only=True) for rank in range(2))
    expected = gradients(model, batch, draws)
    assert first["given"]["grads"].keys() == expected["grads"].keys()
    for part in ("losses", "grads"):
        for name, value in expected[part].items():
            torch.testing.assert_close(first["given"][part][name], value, atol=2e-6, rtol=1e-4)
    # Drawn numbers come from the first process, so that both compute the same losses.
    for name, loss in first["drawn"]["losses"].items():
        assert torch.equal(loss, second["drawn"]["losses"][name]), name


def gradients(model: nn.Module, batch: dict[str, Any], draws: dict[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    losses = model(batch, draws=draws)
    torch.stack(list(losses.values())).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": {name: loss.detach() for name, loss in losses.items()}, "grads": grads}


def run_pair(folder: Path, port: int) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, str(folder / "worker.py"), str(folder)],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "GLOO_SOCKET_IFNAME": "lo",
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for child in children:
        try:
            _, errors = child.communicate(timeout=240)
        except subprocess.TimeoutExpired:
            for other in children:
                other.kill()
            raise
        assert child.returncode == 0, errors

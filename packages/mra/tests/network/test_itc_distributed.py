"""Contrastive loss over several processes: global loss, gradients of the own rows only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.mark.golden("mra", kind="itc_dist")
def test_loss_and_gradients_of_each_process(
    golden: Any, golden_name: str, group: Callable[..., Any], tmp_path: Path
) -> None:
    case = golden(golden_name)
    tensors, allowed = case.tensors(), case.case["tolerance"]
    inputs = {name: tensors[name] for name in ("image_feat", "text_feat", "idx")}
    work = {"what": "contrastive", "config": case.case["config"], "temp": case.case["temp"], **inputs}
    (answers,) = group([{**work, "world": case.case["world"]}], tmp_path)
    for rank, answer in enumerate(answers):
        for name, value in answer.items():
            assert (value - tensors[name][rank]).abs().max() <= allowed, (rank, name)


def test_processes_share_one_global_loss(
    model: Callable[..., Any], batch: Callable[..., Any], config: Callable[..., Any], group: Callable[..., Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """The temperature's gradient is the full one on every process, and the loss that of the joined batch."""
    features = torch.randn(2, 3, 2, 16, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2], [2, 3, 0]])
    work = {"what": "contrastive", "config": config("cuhk"), "temp": 0.1}
    halves = {"image_feat": features[:, :, 0].clone(), "text_feat": features[:, :, 1].clone(), "idx": ids}
    joined = {name: value.flatten(0, 1)[None] for name, value in halves.items()}
    # The whole forward pass: one exchange for all branches gives the same ITC.
    net = model("sda")
    inputs = batch(net, size=4)
    batches = [{name: value[part] for name, value in inputs.items()} for part in (slice(0, 2), slice(2, 4))]
    swap = (torch.tensor([1, 0]), torch.tensor([1, 0]))
    passes = {"what": "forward", "config": config("sda"), "state": net.state_dict(), "batches": batches}
    passes["negatives"] = {"main": swap, "region": swap}
    jobs = [{**work, **halves, "world": 2}, {**work, **joined, "world": 1}, {**passes, "world": 2}]
    (first, second), (alone,), losses = group(jobs, tmp_path)
    for answer in (first, second):
        torch.testing.assert_close(answer["loss"], alone["loss"])
        torch.testing.assert_close(answer["grad_temp"], alone["grad_temp"])
    for name in ("grad_image", "grad_text"):
        torch.testing.assert_close(torch.cat([first[name], second[name]]), alone[name])
    assert losses[0]["losses"][0] == losses[1]["losses"][0]
    assert losses[0]["losses"][1] != losses[1]["losses"][1]  # matching is a loss of the own batch

"""Losses against stored values and against a naive loop; two processes against one."""

import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from diana.losses import build_targets, compute_itc, compute_sdm, gather_rows

# Newer Pythons warn about forking a process with threads.
NO_FORK_WARNING = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


def half_of_the_batch(rank: int, folder: Path, model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """One of two processes: rank r takes half r; rank 0 writes all losses and the norms of the mean gradients."""
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    share = len(inputs["image_ids"]) // 2
    rows = slice(rank * share, (rank + 1) * share)
    output = model(**{name: value[rows].contiguous() for name, value in inputs.items()})
    output.loss.backward()
    losses: list[Any] = [None, None]
    names = ("loss", "loss_itc", "loss_sdm", "loss_refine")
    dist.all_gather_object(losses, {name: getattr(output, name).item() for name in names})
    norms = {}
    for name, parameter in model.named_parameters():
        mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad / 2
        dist.all_reduce(mean)
        norms[name] = mean.norm().item()
    if rank == 0:
        (folder / "out.json").write_text(json.dumps({"losses": losses, "norms": norms}), encoding="utf-8")
    dist.destroy_process_group()


def on_two_ranks(folder: Path, of_rank: Callable[..., None], *arguments: Any) -> Any:
    """Run `of_rank(rank, folder, *arguments)` in two processes; returns what rank 0 has written to out.json."""
    # Forked, because every fresh interpreter would spend seconds on importing transformers.
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=of_rank, args=(rank, folder, *arguments)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout=120)
        child.kill()
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    return json.loads((folder / "out.json").read_text(encoding="utf-8"))


@pytest.mark.golden("diana", kind="gather")
@NO_FORK_WARNING
def test_two_processes_match_the_released_code_and_one_process(
    golden: Any, golden_name: str, golden_model: Any, tmp_path: Path
) -> None:
    case = golden(golden_name)
    single = golden((case.folder / case.case["config_from"]).resolve().parent.name)
    model = golden_model(single)
    inputs = {name: value[: case.case["batch"]] for name, value in single.tensors("inputs.safetensors").items()}
    found = on_two_ranks(tmp_path, half_of_the_batch, model, inputs)
    for losses, expected in zip(found["losses"], case.case["rank_losses"], strict=True):
        for name, value in expected.items():
            assert losses[name] == pytest.approx(value, **relaxed(case))
    for name, norm in case.case["grad_norms"].items():
        assert found["norms"][name] == pytest.approx(norm, rel=5e-3), name

    output = model(**inputs)
    output.loss.backward()
    mean = sum(losses["loss"] for losses in found["losses"]) / 2
    assert output.loss.item() == pytest.approx(mean, rel=1e-5)
    for name, parameter in model.named_parameters():
        assert found["norms"][name] == pytest.approx(parameter.grad.norm().item(), rel=2e-3, abs=1e-4), name


@NO_FORK_WARNING
def test_two_processes_and_one_agree(tiny_model: Any, batch: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model = tiny_model()
    found = on_two_ranks(tmp_path, half_of_the_batch, model, batch)
    output = model(**batch)
    output.loss.backward()
    for name in ("loss", "loss_itc", "loss_sdm", "loss_refine"):
        mean = sum(losses[name] for losses in found["losses"]) / 2
        assert getattr(output, name).item() == pytest.approx(mean, rel=1e-5)
    for name, parameter in model.named_parameters():
        norm = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert found["norms"][name] == pytest.approx(norm, rel=2e-3, abs=1e-4), name


def relaxed(case: Any) -> dict[str, float]:
    return {"rel": case.case["tolerance"]["rtol"], "abs": case.case["tolerance"]["atol"]}


@pytest.mark.golden("diana", kind="losses")
def test_stored_losses(golden: Any, golden_name: str) -> None:
    case = golden(golden_name)
    inputs, expected = case.tensors("inputs.safetensors"), case.tensors("expected.safetensors")
    targets = build_targets(inputs["ids"], inputs["ids_all"])
    torch.testing.assert_close(targets, expected["targets"], **case.case["tolerance"])
    for name, loss in (("itc", compute_itc), ("sdm", compute_sdm)):
        sim = inputs["sim"].clone().requires_grad_()
        value = loss(sim, targets)
        value.backward()
        torch.testing.assert_close(value.detach(), expected[name], **case.case["tolerance"])
        torch.testing.assert_close(sim.grad, expected[f"{name}_grad"], **case.case["tolerance"])


def test_losses_equal_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    sim = 20 * torch.randn(5, 8, generator=generator, dtype=torch.float64)
    ids, ids_all = [1, 2, 1, 4, 5], [1, 2, 1, 4, 5, 2, 2, 9]
    itc = sdm = 0.0
    for r, row in enumerate(sim.tolist()):
        total = sum(math.exp(value) for value in row)
        same = sum(other == ids[r] for other in ids_all)
        for c, value in enumerate(row):
            p, q = math.exp(value) / total, (ids_all[c] == ids[r]) / same
            itc -= q * math.log(p) / len(ids)
            sdm += p * (math.log(p) - math.log(q + 1e-6)) / len(ids)
    targets = build_targets(torch.tensor(ids), torch.tensor(ids_all)).double()
    # The targets are float32: a third differs from 1/3 in the eighth place.
    assert compute_itc(sim, targets).item() == pytest.approx(itc, rel=1e-7)
    assert compute_sdm(sim, targets).item() == pytest.approx(sdm, rel=1e-7)


def test_gradients_are_those_of_the_formula() -> None:
    generator = torch.Generator().manual_seed(1)
    sim = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = build_targets(torch.tensor([0, 1, 0]), torch.tensor([0, 1, 0, 0])).double()
    assert torch.autograd.gradcheck(lambda s: compute_itc(s, targets), (sim,))
    assert torch.autograd.gradcheck(lambda s: compute_sdm(s, targets), (sim,))


@pytest.mark.parametrize("loss", [compute_itc, compute_sdm])
def test_large_similarities_stay_finite(loss: Any) -> None:
    sim = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    value = loss(sim, torch.eye(2))
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-5) and torch.isfinite(sim.grad).all()


def test_targets_of_equal_identities_share_a_row() -> None:
    targets = build_targets(torch.tensor([[7], [8], [7]]))
    assert targets.tolist() == [[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]]


def shared_gradient(rank: int, folder: Path) -> None:
    """One of two processes: the gathered rows are added to others of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    rows, others = torch.ones(1, 2, requires_grad=True), torch.ones(2, 2, requires_grad=True)
    scaled = 2 * others
    # Autograd gives both summands one and the same gradient tensor, and the one that was made last comes first.
    ((gather_rows(rows) + scaled) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    if rank == 0:
        assert rows.grad is not None and others.grad is not None
        (folder / "out.json").write_text(json.dumps([rows.grad.tolist(), others.grad.tolist()]), encoding="utf-8")
    dist.destroy_process_group()


@NO_FORK_WARNING
def test_a_gradient_that_others_read_too_is_left_alone(tmp_path: Path) -> None:
    rows, others = on_two_ranks(tmp_path, shared_gradient)
    assert rows == [[2.0, 4.0]]
    assert others == [[2.0, 4.0], [6.0, 8.0]]


def test_a_single_process_gathers_its_own_rows() -> None:
    rows = torch.randn(3, 2)
    assert gather_rows(rows) is rows

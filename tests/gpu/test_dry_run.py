"""The five systems on a GPU that is not there, and that the fake GPU reports what it should.

`pytest tests/gpu -m full_size` runs them as deep as in the papers, which takes minutes.
"""

from typing import Any

import pytest
import torch
from dry_run import measure
from fake_cuda import DEVICE, fake_cuda, on_device
from paper_systems import SYSTEMS, Size
from torch import nn

# Of each phase: GiB that it may take at most with few layers and at the paper's size, the least share of its operations in
# half precision, and how often the host may wait. No step waits; a ranking does, for what it returns.
LIMITS = {
    "cmlfa": {"training step": (3.4, 9.0, 0.999, 0), "encoding": (3.4, 3.6, 0.999, 0)},
    "fafa": {
        "training step": (7.3, 22.5, 0.999, 0),
        "encoding": (1.3, 3.5, 0.9, 0),
        "ranking": (0.5, 2.8, 0.0, 13),
    },
    "mra sda": {"training step": (4.5, 13.5, 0.999, 0)},
    "mra cuhk": {"training step": (6.2, 19.5, 0.999, 0), "encoders and judge": (1.8, 2.7, 0.999, 2)},
    "diana pre-training": {"training step": (13.5, 55.0, 0.999, 0)},
    "diana fine-tuning": {"training step": (12.5, 56.0, 0.999, 0), "encoding": (2.1, 5.0, 0.999, 4)},
    "dp_gen": {"training step": (3.6, 18.0, 0.999, 0), "sampling, 2 steps": (0.8, 3.2, 0.999, 0)},
}


@pytest.mark.parametrize("size", ["few layers", pytest.param("paper", marks=pytest.mark.full_size)])
@pytest.mark.parametrize("name", SYSTEMS)
@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_nothing_waits_and_memory_and_precision_are_kept(name: str, size: Size) -> None:
    costs = measure(SYSTEMS[name], size)
    assert costs.keys() == LIMITS[name].keys()
    for phase, cost in costs.items():
        small, paper, half, waits = LIMITS[name][phase]
        peak = paper if size == "paper" else small
        assert sum(cost.waits.values()) <= waits, f"{phase} waits for the device:\n" + "\n".join(cost.waits)
        assert 0.8 * peak < cost.peak <= peak, f"{phase} takes {cost.peak:.2f} GiB"
        assert cost.half_share >= half, f"only {cost.half_share:.2%} of {phase} is computed in half precision"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6), nn.Dropout(0.5))


def test_the_walk_over_the_graph_computes_what_autograds_engine_does() -> None:
    def gradients() -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, table = network(), nn.Embedding(5, 6)
        rows = table(torch.tensor([0, 3, 3]))
        out = torch.utils.checkpoint.checkpoint(model, rows, use_reentrant=False)
        mixed = nn.functional.scaled_dot_product_attention(out[None], rows[None], model(rows)[None])
        (mixed.square().mean() + out.sum() * rows.std()).backward()
        return [
            parameter.grad for parameter in (*model.parameters(), *table.parameters()) if parameter.grad is not None
        ]

    expected = gradients()
    with fake_cuda():
        found = gradients()
    assert len(found) == 7 and all(torch.equal(*pair) for pair in zip(expected, found))


@pytest.mark.parametrize(
    "waiting, what",
    [
        (lambda x: x.sum().item(), "a number is read"),
        (lambda x: bool((x > 0).any()), "a number is read"),
        (lambda x: x[x > 0], "a boolean mask"),
        (lambda x: x.index_put_((x > 0,), x.new_zeros(())), "a boolean mask"),
        (lambda x: x.nonzero(), "nonzero asks for a shape"),
        (lambda x: x.cpu(), "cuda -> cpu blocks"),
        (lambda x: x.new_tensor([1.0, 2.0]), "cpu -> cuda blocks"),
        (lambda x: torch.ones(3).to(x.device), "cpu -> cuda blocks"),
        (lambda x: x.copy_(torch.ones(2, 3)), "cpu -> cuda blocks"),
        (lambda x: x[torch.tensor([0, 1])], "an index on cpu is copied"),
    ],
)
def test_waits_are_found(waiting: Any, what: str) -> None:
    with fake_cuda() as device:
        waiting(torch.zeros(2, 3, device=DEVICE))
        (wait,) = device.waits
        assert what in wait and "test_dry_run.py" in wait


def test_what_need_not_wait_is_not_counted() -> None:
    with fake_cuda() as device:
        x = torch.ones(2, 3).to(DEVICE, non_blocking=True)
        y = x.to("cpu", non_blocking=True)
        x = torch.where(x > 0, x, torch.full((), 2.0, device=DEVICE))[torch.arange(2, device=DEVICE)] * 2
        assert torch.ones(3)[torch.ones(3) > 0].sum().item() == 3  # on the CPU, where numbers are real
        assert y.device.type == "cpu" and not device.waits


def test_an_operation_on_two_devices_raises() -> None:
    with fake_cuda(), pytest.raises(RuntimeError, match="cpu"):
        torch.ones(3) + torch.ones(3, device=DEVICE)


def test_live_bytes_and_operations_are_counted() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    with fake_cuda() as device:
        on_device(model)
        matrix = 256 * 256 * 4
        assert device.live == 4 * matrix
        x = torch.empty(256, 256, device=DEVICE)
        with torch.no_grad():
            model(x)
        assert device.peak == 7 * matrix and device.live == 5 * matrix  # input and output of a layer beside x
        device.start()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            out = model(x)
        assert device.flops == {torch.bfloat16: 4 * 2 * 256**3} and device.half_share == 1
        out.sum().backward()
        del out
        assert device.live == 9 * matrix and sum(device.flops.values()) == 11 * 2 * 256**3  # x needs no gradient

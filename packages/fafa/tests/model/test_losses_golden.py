"""Each loss alone against stored values and gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fafa.losses import (
    DistributionUncertainty,
    FeatureDispersionLoss,
    HardNegativeNCE,
    MaskedFeaturePrediction,
    compute_sdm,
    coral_loss,
    mmd_loss,
)


@pytest.mark.golden("fafa", prefix="losses")
def test_values_and_gradients(golden: Callable[..., Any], case_name: str) -> None:
    stored = golden(case_name)
    tensors, tolerance = stored.tensors(), stored.case["tolerance"]
    for name, parameters in stored.case["parameters"].items():
        given = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        for key, value in evaluate(name, parameters, given).items():
            torch.testing.assert_close(value, given[f"expected.{key}"], atol=tolerance["atol"], rtol=tolerance["rtol"])


def evaluate(name: str, parameters: dict[str, Any], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of the loss that the name begins with."""
    kind = name.rstrip("0123456789")
    if kind == "sdm":
        sim = given["sim"].requires_grad_()
        loss = compute_sdm(sim, given["qid"], **parameters)
        return {"loss": loss, "grad": gradients(loss, sim)[0]}
    if kind == "fd":
        features = given["features"].requires_grad_()
        loss = FeatureDispersionLoss(**parameters)(features, indices=given.get("indices"))
        return {"loss": loss, "grad": gradients(loss, features)[0]}
    if kind == "mfr":
        module = MaskedFeaturePrediction(**parameters)
        weights = {key.removeprefix("weight."): value for key, value in given.items() if key.startswith("weight.")}
        module.load_state_dict(weights)
        first, second = given["A"].requires_grad_(), given["B"].requires_grad_()
        loss = module(first, second, given["mask_A"], given["mask_B"])
        own = dict(module.named_parameters())
        grads = gradients(loss, first, second, *own.values())
        named = {f"grad.{key}": grad for key, grad in zip(own, grads[2:])}
        return {"loss": loss, "grad_A": grads[0], "grad_B": grads[1], **named}
    if kind == "dsu":
        x = given["x"].requires_grad_()
        module = DistributionUncertainty(parameters["p"], parameters["eps"])
        y = module(x, gate=0.0, eps_beta=given["eps_beta"], eps_gamma=given["eps_gamma"])
        return {"y": y, "grad": gradients((y * given["weight"]).sum(), x)[0]}
    if kind == "hnnce":
        sim = given["sim"].requires_grad_()
        loss = HardNegativeNCE(**parameters)(sim)
        return {"loss": loss, "grad": gradients(loss, sim)[0]}
    x, y = given["x"].requires_grad_(), given["y"].requires_grad_()
    loss = {"mmd": mmd_loss, "coral": coral_loss}[kind](x, y, **parameters)
    grad_x, grad_y = gradients(loss, x, y)
    return {"loss": loss, "grad_x": grad_x, "grad_y": grad_y}


def gradients(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)

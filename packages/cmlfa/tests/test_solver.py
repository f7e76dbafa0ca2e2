"""Parameter groups and schedules against stored values, and the exchange of their state with the released layout."""

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cmlfa import get_args
from cmlfa.model import CMLFA, official_param_order
from cmlfa.solver import (
    build_lr_scheduler,
    build_optimizer,
    load_official_optimizer_state,
    load_official_scheduler_state,
    official_optimizer_state,
    official_scheduler_state,
    parameter_rule,
)
from tbps_common.errors import CheckpointError, InputError

SCHEDULE = {
    "milestones": (20, 50),
    "gamma": 0.1,
    "lrscheduler": "cosine",
    "warmup_factor": 0.1,
    "warmup_epochs": 5,
    "warmup_method": "linear",
    "num_epoch": 12,
    "target_lr": 0.0,
    "power": 0.9,
}


def groups_by_name(optimizer: torch.optim.Optimizer, model: CMLFA) -> dict[str, dict[str, Any]]:
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    return {name_of[id(parameter)]: group for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.golden("cmlfa", kind="solver")
def test_stored_groups_and_rates(golden: Any, golden_name: str, build_golden_model: Any) -> None:
    case = golden(golden_name)
    model = build_golden_model(golden(case.case["model_case"]))
    relative = case.case["tolerance"]["rel"]
    for config in case.case["configs"]:
        args = get_args([])
        vars(args).update({**case.case["base_args"], **config["args"]})
        optimizer = build_optimizer(args, model)
        assert type(optimizer).__name__ == config["optimizer"]
        for name, value in config["defaults"].items():
            assert optimizer.defaults[name] == (tuple(value) if isinstance(value, list) else value)
        assert len(optimizer.param_groups) <= 4
        groups = groups_by_name(optimizer, model)
        if "groups" in config:
            found = {name: (group["lr"], group["weight_decay"]) for name, group in groups.items()}
            assert set(found) == set(config["groups"])
            for name, expected in config["groups"].items():
                assert found[name] == pytest.approx(expected, rel=relative), name
        scheduler = build_lr_scheduler(args, optimizer)
        rates = {name: [] for name in config["lr_per_epoch"]}
        for _ in range(len(config["lr_per_epoch"]["base_model.positional_embedding"])):
            for name in rates:
                rates[name].append(groups[name]["lr"])
            optimizer.step()
            scheduler.step()
        for name, expected in config["lr_per_epoch"].items():
            assert rates[name] == pytest.approx(expected, rel=relative), (config["args"], name)


@pytest.mark.parametrize(
    ("name", "lr", "weight_decay"),
    [
        ("base_model.positional_embedding", 1.0, 0.1),
        ("safl.part_tokens", 1.0, 0.1),
        ("shared_transformer.resblocks.0.attn.in_proj_bias", 2.0, 0.0),
        ("cross_attn.in_proj_weight", 5.0, 0.1),
        ("cross_modal_transformer.resblocks.0.ln_1.bias", 2.0, 0.0),
        ("classifier.weight", 5.0, 0.1),
        ("classifier.bias", 5.0, 0.0),
        ("mlm_head.fc.bias", 5.0, 0.0),
    ],
)
def test_the_rule_of_each_parameter(name: str, lr: float, weight_decay: float) -> None:
    args = SimpleNamespace(lr=1.0, weight_decay=0.1, lr_factor=5.0, bias_lr_factor=2.0, weight_decay_bias=0.0)
    assert parameter_rule(name, args) == (lr, weight_decay)


def one_weight(**flags: Any) -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    return optimizer, build_lr_scheduler(SimpleNamespace(**(SCHEDULE | flags)), optimizer)


def test_the_first_rates_of_the_paper_s_command() -> None:
    optimizer, scheduler = one_weight(num_epoch=150)
    rates = []
    for _ in range(150):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:6] == pytest.approx([0.1, 0.28, 0.46, 0.64, 0.82, 1.0])
    assert rates[-1] == pytest.approx(1.2e-4, rel=0.03)
    assert rates == sorted(rates[:6]) + sorted(rates[6:], reverse=True)


@pytest.mark.parametrize("mode", ["step", "exp", "poly", "cosine", "linear"])
def test_a_run_as_long_as_its_warm_up(mode: str) -> None:
    optimizer, scheduler = one_weight(num_epoch=5, lrscheduler=mode)
    for _ in range(5):
        optimizer.step()
        scheduler.step()
    last = {"step": 1.0, "exp": 0.9, "poly": 1.0, "cosine": 0.0, "linear": 0.0}[mode]
    assert optimizer.param_groups[0]["lr"] == pytest.approx(last)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"lrscheduler": "plateau"}, "--lrscheduler must be one of"),
        ({"warmup_method": "cosine"}, "--warmup_method must be one of"),
        ({"milestones": (50, 20)}, "--milestones must be increasing"),
    ],
)
def test_unusable_schedules(flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        one_weight(**flags)


def test_optimizer_names_in_any_case(toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA]) -> None:
    model = toy_model()
    assert isinstance(build_optimizer(toy_args(optimizer="adamw"), model), torch.optim.AdamW)
    assert isinstance(build_optimizer(toy_args(optimizer="SGD"), model), torch.optim.SGD)
    with pytest.raises(InputError, match="--optimizer"):
        build_optimizer(toy_args(optimizer="Lion"), model)


def train(model: CMLFA, optimizer: Any, batch: dict[str, torch.Tensor], steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        entries = model(batch)
        loss = torch.stack([value for name, value in entries.items() if "loss" in name]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def released_optimizer(args: Any, model: CMLFA) -> torch.optim.Optimizer:
    """One group per parameter in the released order, as the released code builds it."""
    parameters = dict(model.named_parameters())
    groups = []
    for name in official_param_order(model):
        lr, weight_decay = parameter_rule(name, args)
        groups.append({"params": [parameters[name]], "lr": lr, "weight_decay": weight_decay})
    if args.optimizer == "SGD":
        return torch.optim.SGD(groups, lr=args.lr, momentum=args.momentum)
    if args.optimizer == "AdamW":
        return torch.optim.AdamW(groups, lr=args.lr, betas=(args.alpha, args.beta), eps=1e-8)
    return torch.optim.Adam(groups, lr=args.lr, betas=(args.alpha, args.beta), eps=1e-3)


@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "SGD"])
def test_state_goes_to_the_released_optimizer_and_back(
    toy_args: Callable[..., Any],
    toy_model: Callable[..., CMLFA],
    toy_batch: Callable[..., dict[str, torch.Tensor]],
    optimizer: str,
) -> None:
    args, batch = toy_args(optimizer=optimizer, lr=1e-4), toy_batch()
    ours = toy_model().eval()
    our_optimizer = build_optimizer(args, ours)
    train(ours, our_optimizer, batch, 2)
    stored = official_optimizer_state(our_optimizer, ours)

    theirs = copy.deepcopy(ours)
    their_optimizer = released_optimizer(args, theirs)
    their_optimizer.load_state_dict(copy.deepcopy(stored))
    assert [group["params"] for group in their_optimizer.state_dict()["param_groups"]] == [
        [index] for index in range(len(stored["param_groups"]))
    ]
    unused = official_param_order(ours).index("safl.pos_embeding")
    assert unused not in their_optimizer.state_dict()["state"]

    # The released code goes on for a step, and its state comes back.
    their_losses = train(theirs, their_optimizer, batch, 1)
    back = copy.deepcopy(theirs)
    back_optimizer = build_optimizer(args, back)
    load_official_optimizer_state(back_optimizer, back, their_optimizer.state_dict(), "theirs.pth")
    losses = train(ours, our_optimizer, batch, 3)
    # The fused and the plain kernel round differently; the runs agree to float32 precision.
    assert losses[0] == pytest.approx(their_losses[0], rel=1e-5)
    assert losses[1:] == pytest.approx(train(back, back_optimizer, batch, 2), rel=1e-4)


def test_state_of_an_old_torch_with_integer_steps(
    toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA], toy_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    args, batch, model = toy_args(lr=1e-4), toy_batch(), toy_model().eval()
    optimizer = build_optimizer(args, model)
    train(model, optimizer, batch, 2)
    stored = official_optimizer_state(optimizer, model)
    for entry in stored["state"].values():
        entry["step"] = int(entry["step"])
    kept = ("lr", "weight_decay", "betas", "eps", "amsgrad", "params")
    stored["param_groups"] = [{key: group[key] for key in kept} for group in stored["param_groups"]]
    twin = copy.deepcopy(model)
    twin_optimizer = build_optimizer(args, twin)
    load_official_optimizer_state(twin_optimizer, twin, copy.deepcopy(stored), "old.pth")
    assert train(model, optimizer, batch, 2) == train(twin, twin_optimizer, batch, 2)


def test_loading_keeps_this_process_s_kernel(toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA]) -> None:
    model = toy_model()
    optimizer = build_optimizer(toy_args(), model)
    stored = official_optimizer_state(optimizer, model)
    assert all(group["fused"] is None for group in stored["param_groups"])
    load_official_optimizer_state(optimizer, model, stored, "file.pth")
    assert all(group["fused"] is True for group in optimizer.param_groups)


def test_state_that_does_not_fit_is_refused_and_changes_nothing(
    toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA], toy_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    model = toy_model().eval()
    optimizer = build_optimizer(toy_args(), model)
    train(model, optimizer, toy_batch(), 1)
    stored = official_optimizer_state(optimizer, model)

    other = toy_model(loss_names="sdm")
    other_optimizer = build_optimizer(toy_args(), other)
    with pytest.raises(CheckpointError, match=r"run\.pth covers \d+ parameters"):
        load_official_optimizer_state(other_optimizer, other, stored, "run.pth")

    sgd = build_optimizer(toy_args(optimizer="SGD"), model)
    with pytest.raises(CheckpointError, match="resume with the --optimizer"):
        load_official_optimizer_state(sgd, model, stored, "run.pth")

    fresh = build_optimizer(toy_args(), model)
    wrong = copy.deepcopy(stored)
    wrong["state"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match="base_model.positional_embedding"):
        load_official_optimizer_state(fresh, model, wrong, "run.pth")
    assert not fresh.state and not other_optimizer.state


def test_flags_of_today_decide_the_settings(
    toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA], toy_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    """The moments come from the file; rates and decays are those of the flags, even if the groups are others."""
    model = toy_model().eval()
    before = build_optimizer(toy_args(), model)
    train(model, before, toy_batch(), 1)
    stored = official_optimizer_state(before, model)
    now = build_optimizer(toy_args(lr=3e-4, lr_factor=1.0, weight_decay=0.0, alpha=0.8), model)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in now.param_groups]
    assert len(settings) != len(before.param_groups)
    load_official_optimizer_state(now, model, stored, "run.pth")
    assert [{key: value for key, value in group.items() if key != "params"} for group in now.param_groups] == settings
    for parameter, state in before.state.items():
        assert torch.equal(now.state[parameter]["exp_avg"], state["exp_avg"])


def test_scheduler_state_has_one_rate_per_parameter_and_comes_back(
    toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA]
) -> None:
    args, model = toy_args(num_epoch=20), toy_model()
    optimizer = build_optimizer(args, model)
    scheduler = build_lr_scheduler(args, optimizer)
    for _ in range(7):
        optimizer.step()
        scheduler.step()
    stored = official_scheduler_state(scheduler, optimizer, model)
    names = official_param_order(model)
    assert len(stored["base_lrs"]) == len(stored["_last_lr"]) == len(names)
    rule = [parameter_rule(name, args)[0] for name in names]
    assert stored["base_lrs"] == rule
    expected = {
        "milestones", "mode", "gamma", "warmup_factor", "warmup_epochs", "warmup_method", "total_epochs",
        "target_lr", "power", "base_lrs", "last_epoch", "_step_count", "_last_lr",
    }  # fmt: skip
    assert expected <= set(stored)

    # It must be readable without unpickling code, and attributes of other versions of torch must not disturb.
    file = io.BytesIO()
    torch.save(stored | {"verbose": False, "_get_lr_called_within_step": False}, file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    twin_optimizer = build_optimizer(args, model)
    twin = build_lr_scheduler(args, twin_optimizer)
    load_official_scheduler_state(twin, twin_optimizer, model, content, "run.pth")
    for _ in range(13):
        assert [group["lr"] for group in twin_optimizer.param_groups] == [g["lr"] for g in optimizer.param_groups]
        for one in (optimizer, twin_optimizer):
            one.step()
        scheduler.step()
        twin.step()


def test_scheduler_state_that_does_not_fit(toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA]) -> None:
    args, model = toy_args(), toy_model()
    optimizer = build_optimizer(args, model)
    scheduler = build_lr_scheduler(args, optimizer)
    stored = official_scheduler_state(scheduler, optimizer, model)
    with pytest.raises(CheckpointError, match="covers 4 parameters"):
        four = stored | {"base_lrs": [1e-5] * 4, "_last_lr": [1e-5] * 4}
        load_official_scheduler_state(scheduler, optimizer, model, four, "f")
    with pytest.raises(CheckpointError, match="is missing last_epoch"):
        load_official_scheduler_state(
            scheduler, optimizer, model, {"base_lrs": [], "_step_count": 1, "_last_lr": []}, "f"
        )


def test_training_learns_a_batch_by_heart(
    toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA], toy_batch: Callable[..., dict[str, torch.Tensor]]
) -> None:
    model = toy_model(lfa_attention="parts", temperature=0.1).train()
    batch = toy_batch(size=5) | {"pids": torch.arange(5)}
    losses = train(model, build_optimizer(toy_args(optimizer="AdamW", lr=1e-3), model), batch, 40)
    assert losses[-1] < 0.1 * losses[0]
    with torch.no_grad():
        entries = model.eval()(batch)
    assert entries["img_acc"] == entries["txt_acc"] == 1

"""Checkpoints: every container form, strictness, resuming, and start weights."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cmlfa import build_model, load_checkpoint
from cmlfa.checkpoint import Checkpointer
from cmlfa.model import CMLFA, clip_geometry
from cmlfa.model.start_weights import download
from cmlfa.solver import build_lr_scheduler, build_optimizer
from tbps_common.errors import CheckpointError, InputError
from tbps_world.tiny.clip import write_tiny_clip


@torch.no_grad()
@pytest.mark.golden("cmlfa", kind="checkpoint")
def test_container_forms(golden: Any, golden_name: str, build_golden_model: Any, tmp_path: Path) -> None:
    case = golden(golden_name)
    stored = golden(case.case["model_case"])
    weights, expected, extra = stored.tensors("weights.safetensors"), stored.tensors(), case.case["expect_extra"]
    with_module = {f"module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"model": weights, **extra}, tmp_path / "best.pth")
    torch.save({"model": with_module, **extra}, tmp_path / "ddp.pth")
    save_file(weights, tmp_path / "best.safetensors")
    forms: list[tuple[Any, dict[str, Any]]] = [
        (weights, {}),
        ({"model": weights, **extra}, extra),
        ({"state_dict": weights, **extra}, extra),
        (with_module, {}),
        (tmp_path / "best.pth", extra),
        (str(tmp_path / "ddp.pth"), extra),
        (tmp_path / "best.safetensors", {}),
    ]
    for source, remaining in forms:
        model = build_golden_model(stored, load=False)
        assert load_checkpoint(model, source) == remaining
        difference = (model.encode_image(expected["images"]) - expected["feat_image"]).abs().max()
        assert difference < case.case["tolerance"]["features"]
        state = model.state_dict()
        assert {name: tensor.shape for name, tensor in state.items()} == {k: t.shape for k, t in weights.items()}
    missing = {name: tensor for name, tensor in weights.items() if name != "safl.part_tokens"}
    with pytest.raises(CheckpointError, match=r"safl\.part_tokens"):
        load_checkpoint(build_golden_model(stored, load=False), missing)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: state.pop("base_model.ln_final.weight"), "base_model.ln_final.weight"),
        (lambda state: state.update(surplus=torch.zeros(1)), "surplus"),
        (lambda state: state.update({"classifier.bias": torch.zeros(9)}), "classifier.bias"),
        (lambda state: state.pop("mlm_head.fc.bias"), "mlm_head.fc.bias"),
    ],
    ids=["missing", "unexpected", "shape", "missing-head"],
)
def test_strict_loading_names_what_does_not_fit(
    toy_model: Callable[..., CMLFA], change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    model = toy_model()
    before = copy.deepcopy(model.state_dict())
    state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError, match=named):
        load_checkpoint(model, state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_evaluation_does_without_the_training_heads(
    toy_model: Callable[..., CMLFA], caplog: pytest.LogCaptureFixture
) -> None:
    trained = toy_model(loss_names="sdm+id")
    torch.nn.init.normal_(trained.safl.part_tokens)
    model = toy_model()
    with caplog.at_level(logging.WARNING, "cmlfa.model"):
        load_checkpoint(model, trained.state_dict(), strict=False)
    assert "the given state dict" in caplog.text and "cross_attn.in_proj_weight" in caplog.text
    assert torch.equal(model.safl.part_tokens, trained.safl.part_tokens)

    state = trained.state_dict() | {"classifier.weight": torch.zeros(9, 64), "classifier.bias": torch.zeros(9)}
    untouched = model.classifier.weight.clone()
    load_checkpoint(model, state, strict=False)
    assert torch.equal(model.classifier.weight, untouched)

    load_checkpoint(toy_model(loss_names="sdm"), model.state_dict(), strict=False)
    for name in ("safl.feed.1.weight", "base_model.visual.proj"):
        broken = {key: tensor for key, tensor in trained.state_dict().items() if key != name}
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(model, broken, strict=False)
    with pytest.raises(CheckpointError, match="surplus"):
        load_checkpoint(model, trained.state_dict() | {"surplus": torch.zeros(1)}, strict=False)


def test_half_precision_files_load_into_float32(toy_model: Callable[..., CMLFA]) -> None:
    model = toy_model()
    half = {name: tensor.half() for name, tensor in model.state_dict().items()}
    load_checkpoint(model, half)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert torch.equal(model.safl.part_tokens, half["safl.part_tokens"].float())


def step(model: CMLFA, optimizer: Any, batch: dict[str, torch.Tensor]) -> float:
    loss = torch.stack([value for name, value in model(batch).items() if "loss" in name]).sum()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_a_resumed_run_goes_on_bit_for_bit(
    toy_args: Callable[..., Any],
    toy_model: Callable[..., CMLFA],
    toy_batch: Callable[..., dict[str, torch.Tensor]],
    tmp_path: Path,
) -> None:
    args = toy_args(lr=1e-4, num_epoch=9)

    def fresh() -> tuple[CMLFA, Any, Any]:
        model = toy_model().eval()
        optimizer = build_optimizer(args, model)
        return model, optimizer, build_lr_scheduler(args, optimizer)

    model, optimizer, scheduler = fresh()
    for epoch in range(2):
        step(model, optimizer, toy_batch(seed=epoch))
        scheduler.step()
    Checkpointer(model, optimizer, scheduler, tmp_path).save("last", epoch=2, num_epoch=9, iteration=0)
    stored = torch.load(tmp_path / "last.pth", weights_only=True)
    assert set(stored) == {"model", "optimizer", "scheduler", "epoch", "num_epoch", "iteration"}
    assert len(stored["optimizer"]["param_groups"]) == len(stored["scheduler"]["base_lrs"]) == len(stored["model"])

    twin, twin_optimizer, twin_scheduler = fresh()
    torch.nn.init.zeros_(twin.safl.part_tokens)
    remaining = Checkpointer(twin, twin_optimizer, twin_scheduler).resume(tmp_path / "last.pth")
    assert remaining == {"epoch": 2, "num_epoch": 9, "iteration": 0}
    for epoch in range(2, 5):
        assert step(model, optimizer, toy_batch(seed=epoch)) == step(twin, twin_optimizer, toy_batch(seed=epoch))
        scheduler.step()
        twin_scheduler.step()
        assert scheduler.get_last_lr() == twin_scheduler.get_last_lr()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


def test_nothing_is_written_without_a_folder_or_by_other_ranks(toy_model: Callable[..., CMLFA], tmp_path: Path) -> None:
    Checkpointer(toy_model()).save("best")
    Checkpointer(toy_model(), save_dir=tmp_path, save_to_disk=False).save("best")
    assert not list(tmp_path.iterdir())


def test_missing_and_foreign_files_are_named(
    toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA], tmp_path: Path
) -> None:
    model = toy_model()
    with pytest.raises(CheckpointError, match=r"absent\.pth"):
        Checkpointer(model).load(tmp_path / "absent.pth")
    torch.save({"model": model.state_dict(), "optimizer": {"lr": 3}}, tmp_path / "foreign.pth")
    checkpointer = Checkpointer(model, build_optimizer(toy_args(), model))
    with pytest.raises(CheckpointError, match=r"foreign\.pth"):
        checkpointer.resume(tmp_path / "foreign.pth")


def test_a_model_alone_can_be_resumed(
    toy_args: Callable[..., Any],
    toy_model: Callable[..., CMLFA],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = toy_model()
    Checkpointer(model, save_dir=tmp_path).save("weights", epoch=3)
    optimizer = build_optimizer(toy_args(), model)
    scheduler = build_lr_scheduler(toy_args(), optimizer)
    assert Checkpointer(model, optimizer, scheduler).resume(tmp_path / "weights.pth") == {"epoch": 3}
    assert "no optimizer state" in caplog.text and "no scheduler state" in caplog.text


def test_a_model_in_ddp_is_saved_by_its_own_names(toy_model: Callable[..., CMLFA], tmp_path: Path) -> None:
    wrapper = torch.nn.Module()
    wrapper.module = toy_model()
    Checkpointer(wrapper, save_dir=tmp_path).save("best")
    assert "safl.part_tokens" in torch.load(tmp_path / "best.pth", weights_only=True)["model"]


def test_start_weights_in_three_forms(toy_args: Callable[..., Any], toy_clip: Path, tmp_path: Path) -> None:
    state = torch.load(toy_clip, weights_only=True)
    save_file(state, tmp_path / "clip.safetensors")

    class Holder(torch.nn.Module):
        """Tensors under their dotted names, as a TorchScript archive of OpenAI's holds them."""

        def __init__(self, tree: dict[str, Any]):
            super().__init__()
            for name, value in tree.items():
                if isinstance(value, dict):
                    self.add_module(name, Holder(value))
                else:
                    self.register_parameter(name, torch.nn.Parameter(value))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *folders, leaf = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = tensor
    torch.jit.trace(Holder(tree), torch.zeros(1)).save(str(tmp_path / "archive.pt"))
    for form in (toy_clip, tmp_path / "clip.safetensors", tmp_path / "archive.pt"):
        model = build_model(toy_args(pretrain_choice=str(form)), 5)
        assert torch.equal(model.base_model.text_projection, state["text_projection"])
        assert torch.equal(model.base_model.visual.conv1.weight, state["visual.conv1.weight"])


def test_geometry_can_come_from_a_checkpoint(toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA]) -> None:
    trained = toy_model()
    geometry = clip_geometry(trained.state_dict(), "best.pth", prefix="base_model.")
    model = build_model(toy_args(pretrain_choice="gone.pt"), 5, geometry=geometry)
    load_checkpoint(model, trained.state_dict())
    images = torch.randn(2, 3, 64, 32)
    assert torch.equal(model.eval().encode_image(images), trained.eval().encode_image(images))


@pytest.mark.parametrize(
    ("choice", "sentence"),
    [
        ("RN50", "no token-level output"),
        ("ViT-B/8", "neither a file nor one of ViT-B/32"),
        ("missing.pt", "neither a file nor one of"),
    ],
)
def test_unusable_start_weights(toy_args: Callable[..., Any], choice: str, sentence: str) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        build_model(toy_args(pretrain_choice=choice), 5)


@pytest.mark.parametrize("removed", ["visual.proj", "text_projection", "visual.ln_post.bias", "token_embedding.weight"])
def test_incomplete_start_weights_are_named(
    toy_args: Callable[..., Any], toy_clip: Path, tmp_path: Path, removed: str
) -> None:
    state = torch.load(toy_clip, weights_only=True)
    del state[removed]
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(CheckpointError, match=rf"(?s)(part\.pt.*{removed}|{removed}.*part\.pt)"):
        build_model(toy_args(pretrain_choice=str(tmp_path / "part.pt")), 5)


def test_a_resnet_file_is_recognised(toy_args: Callable[..., Any], tmp_path: Path) -> None:
    torch.save({"visual.attnpool.positional_embedding": torch.zeros(2, 2)}, tmp_path / "rn50.pt")
    with pytest.raises(CheckpointError, match="ResNet variant"):
        build_model(toy_args(pretrain_choice=str(tmp_path / "rn50.pt")), 5)


def test_damaged_start_weights(toy_args: Callable[..., Any], toy_clip: Path, tmp_path: Path) -> None:
    content = toy_clip.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 30):
        (tmp_path / "cut.pt").write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pt"):
            build_model(toy_args(pretrain_choice=str(tmp_path / "cut.pt")), 5)


def test_a_download_is_kept_only_when_its_sum_is_right(tmp_path: Path) -> None:
    import hashlib

    content = b"weights" * 1000
    digest = hashlib.sha256(content).hexdigest()
    served = tmp_path / "served" / digest
    served.mkdir(parents=True)
    (served / "clip.pt").write_bytes(content)
    url = (served / "clip.pt").as_uri()
    cache = tmp_path / "cache"
    assert download(url, cache).read_bytes() == content
    (cache / "clip.pt").write_bytes(b"damaged")
    assert download(url, cache).read_bytes() == content

    (served / "clip.pt").write_bytes(b"something else")
    (cache / "clip.pt").unlink()
    with pytest.raises(CheckpointError, match=r"clip\.pt could not be downloaded"):
        download(url, cache)
    with pytest.raises(CheckpointError, match="could not be downloaded"):
        download((tmp_path / "nowhere" / digest / "clip.pt").as_uri(), cache)
    assert not list(cache.iterdir())


def test_tiny_clip_is_reproducible_and_leaves_the_random_state(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"context_length": 8, "vocab_size": 20}
    state = torch.get_rng_state()
    write_tiny_clip(tmp_path / "a.pt", **sizes)
    write_tiny_clip(tmp_path / "b.safetensors", **sizes)
    write_tiny_clip(tmp_path / "c.pt", **sizes, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    from safetensors.torch import load_file

    one, two = torch.load(tmp_path / "a.pt", weights_only=True), load_file(tmp_path / "b.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "logit_scale" in one and one["visual.positional_embedding"].shape == (17, 64)
    other = torch.load(tmp_path / "c.pt", weights_only=True)
    assert not torch.equal(one["text_projection"], other["text_projection"])


@pytest.mark.parametrize("sizes", [{"width": 100}, {"embed_dim": 0}, {"layers": 0}, {"context_length": 2}])
def test_tiny_clip_refuses_impossible_sizes(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(sizes))}"):
        write_tiny_clip(tmp_path / "a.pt", **sizes)

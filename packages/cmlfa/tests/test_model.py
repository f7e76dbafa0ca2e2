"""The model without stored numbers: exact savings, precision, flags, initialisation, and what it refuses."""

import ast
import copy
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from easydict import EasyDict
from torch import Tensor, nn

import cmlfa
import cmlfa.model
from cmlfa import build_model, get_args
from cmlfa.datasets import prepare_batch
from cmlfa.model import CMLFA, ModelSettings, official_param_order, resize_pos_embed
from cmlfa.model.cmlfa import resolve_precision
from cmlfa.model.safl import SAFL
from cmlfa.objectives import compute_id, compute_itc, compute_mlm, compute_sdm
from cmlfa.solver import build_optimizer
from tbps_common.errors import CheckpointError, InputError

Batch = dict[str, Tensor]


def total(entries: dict[str, Tensor]) -> Tensor:
    return torch.stack([value for name, value in entries.items() if "loss" in name]).sum()


def naive_losses(model: CMLFA, batch: Batch) -> dict[str, Tensor]:
    """The forward pass as the method describes it: every text encoded, all MLM logits, one feature at a time."""
    image, text = model.encode_image(batch["images"]), model.encode_text(batch["caption_ids"])
    vision, masked = model.image_tokens(batch["images"]), model.text_tokens(batch["mlm_ids"])
    scores = model.mlm_head(model.cross_former(masked, vision, vision.clone()))
    return {
        "itc_loss": 5 * compute_itc(image, text, 50.0),
        "sdm_loss": compute_sdm(image, text, batch["pids"], 50.0),
        "id_loss": 0.5 * compute_id(model.classifier(image), model.classifier(text), batch["pids"]),
        "mlm_loss": compute_mlm(scores, batch["mlm_labels"]),
    }


@pytest.mark.parametrize("attention", ["batch", "parts"])
@pytest.mark.parametrize("clean", [False, True], ids=["masked", "clean"])
def test_savings_change_neither_losses_nor_gradients(
    toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch], attention: str, clean: bool
) -> None:
    model, batch = toy_model(lfa_attention=attention).eval(), toy_batch(clean=clean)
    naive = copy.deepcopy(model)
    expected = naive_losses(naive, batch)
    entries = model(batch)
    # Both compute in float32 and differ only in the order of sums.
    assert {name: entries[name].item() for name in expected} == pytest.approx(
        {name: value.item() for name, value in expected.items()}, rel=1e-5
    )
    total(entries).backward()
    total(expected).backward()
    for (name, ours), theirs in zip(model.named_parameters(), naive.parameters()):
        if name in CMLFA.unused_parameters:
            assert ours.grad is None
            continue
        assert ours.grad is not None and theirs.grad is not None
        assert (ours.grad - theirs.grad).norm() <= 1e-4 * theirs.grad.norm() + 1e-6, name


def test_positions_found_by_the_loader_change_nothing(
    toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch]
) -> None:
    model, batch = toy_model().eval(), toy_batch()
    prepared = prepare_batch(batch, torch.device("cpu"))
    assert "mlm_positions" in prepared
    found, expected = model(prepared), model(batch)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_text_is_encoded_once_only_when_the_two_captions_are_equal(
    toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch]
) -> None:
    model = toy_model().eval()
    calls: list[int] = []
    model.base_model.token_embedding.register_forward_hook(lambda *_: calls.append(1))
    model(toy_batch())
    assert len(calls) == 1
    model(toy_batch(clean=True))
    assert len(calls) == 3


def test_enabled_losses_decide_the_entries(toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch]) -> None:
    model = toy_model(loss_names=" cmpm + itc ").eval()
    assert list(model(toy_batch())) == ["temperature", "itc_loss", "cmpm_loss"]
    assert not any(name.startswith(("classifier", "mlm_head", "cross")) for name in model.state_dict())
    weighted = toy_model(itc_loss_weight=2.0, id_loss_weight=0.25, mlm_loss_weight=3.0).eval()(toy_batch())
    plain = toy_model(itc_loss_weight=1.0, id_loss_weight=1.0, mlm_loss_weight=1.0).eval()(toy_batch())
    ratios = {name: (weighted[name] / plain[name]).item() for name in ("itc_loss", "id_loss", "mlm_loss")}
    assert ratios == pytest.approx({"itc_loss": 2.0, "id_loss": 0.25, "mlm_loss": 3.0}, rel=1e-6)
    assert torch.equal(weighted["sdm_loss"], plain["sdm_loss"])


def test_dropout_is_the_only_difference_of_training_mode(
    toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch]
) -> None:
    model, batch = toy_model(lfa_dropout=0.0).train(), toy_batch()
    trained = model(batch)
    assert {k: v.item() for k, v in trained.items()} == pytest.approx(
        {k: v.item() for k, v in model.eval()(batch).items()}, rel=1e-5
    )
    model = toy_model().train()
    assert not torch.equal(model(batch)["sdm_loss"], model(batch)["sdm_loss"])


@torch.no_grad()
def test_safl_against_loops() -> None:
    torch.manual_seed(1)
    module = SAFL(6, 2).eval().double()
    tokens = torch.randn(2, 4, 6, dtype=torch.float64)
    for sample in range(2):
        for part in range(2):
            logits = [float(module.part_tokens[part] @ tokens[sample, n]) for n in range(4)]
            weights = [math.exp(value) / sum(map(math.exp, logits)) for value in logits]
            pooled = sum(w * tokens[sample, n] for n, w in enumerate(weights)) / math.sqrt(6)
            hidden = F.gelu(F.linear(F.layer_norm(pooled, (6,)), module.feed[1].weight, module.feed[1].bias))
            expected = F.linear(hidden, module.feed[4].weight, module.feed[4].bias)
            assert torch.allclose(module(tokens)[sample, part], expected, rtol=1e-10)


def test_the_released_attention_mixes_the_samples_of_a_batch(toy_model: Callable[..., CMLFA]) -> None:
    images = torch.randn(4, 3, 64, 32)
    with torch.no_grad():
        batch = toy_model().eval()
        assert not torch.allclose(batch.encode_image(images)[:2], batch.encode_image(images[:2]), atol=1e-3)
        parts = toy_model(lfa_attention="parts").eval()
        assert torch.allclose(parts.encode_image(images)[:2], parts.encode_image(images[:2]), atol=1e-5)
    assert batch.state_dict().keys() == parts.state_dict().keys()


def test_shorter_captions_use_the_first_positions(
    toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch]
) -> None:
    model, ids = toy_model(lfa_attention="parts").eval(), toy_batch()["caption_ids"]
    with torch.no_grad():
        assert torch.allclose(model.text_tokens(ids[:, :10]), model.text_tokens(ids)[:, :10], atol=1e-5)


HALF = (
    "attn.in_proj_weight", "attn.in_proj_bias", "out_proj.weight", "out_proj.bias", "c_fc.weight", "c_fc.bias",
    "c_proj.weight", "c_proj.bias", "text_projection", "visual.proj", "conv1.weight", "part_tokens",
    "classifier.weight", "classifier.bias", "cross_attn.in_proj_weight", "cross_attn.in_proj_bias",
    "mlm_head.dense.weight", "mlm_head.dense.bias", "mlm_head.fc.weight", "mlm_head.fc.bias",
)  # fmt: skip


def test_half_precision_as_released(
    toy_args: Callable[..., Any], toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch]
) -> None:
    model = toy_model(precision="fp16").eval()
    for name, parameter in model.named_parameters():
        half = name.endswith(HALF) or name.startswith("safl.feed.")
        assert parameter.dtype == (torch.float16 if half else torch.float32), name
    full, batch = toy_model().eval(), toy_batch()
    with torch.no_grad():
        for encode, inputs in (("encode_image", batch["images"]), ("encode_text", batch["caption_ids"])):
            feature, expected = getattr(model, encode)(inputs), getattr(full, encode)(inputs)
            assert feature.dtype == torch.float32
            assert (feature - expected).abs().max() < 0.02 * expected.abs().max()
    entries = model(batch)
    assert all(value.dtype == torch.float32 for value in entries.values())
    assert total(entries).item() == pytest.approx(total(full(batch)).item(), rel=0.05)
    total(entries).backward()
    optimizer = build_optimizer(toy_args(), model)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_autocast(toy_model: Callable[..., CMLFA], toy_batch: Callable[..., Batch]) -> None:
    model, batch = toy_model(precision="amp").eval(), toy_batch()
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        entries = model(batch)
        with torch.no_grad():
            feature = model.encode_image(batch["images"])
    assert feature.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in entries.values())
    assert total(entries).item() == pytest.approx(total(model(batch)).item(), rel=0.1)
    total(entries).backward()
    gradients = [p.grad for name, p in model.named_parameters() if name not in CMLFA.unused_parameters]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("precision", "device", "expected"),
    [("auto", "cpu", "fp32"), ("auto", "cuda", "fp16"), ("fp16", "cpu", "fp16"), ("amp", "cuda", "amp")],
)
def test_precision_follows_the_device(precision: str, device: str, expected: str) -> None:
    assert resolve_precision(precision, device) == expected


def test_initialisation_of_the_new_modules(toy_args: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = build_model(toy_args(cmt_depth=2), 500)
    width, depth = 64, 2
    scale = width**-0.5
    block = model.cross_modal_transformer.resblocks[1]
    for weight, std in (
        (model.classifier.weight, 0.001),
        (model.cross_attn.in_proj_weight, scale),
        (model.cross_attn.out_proj.weight, scale * (2 * depth) ** -0.5),
        (block.attn.in_proj_weight, scale),
        (block.attn.out_proj.weight, scale * (2 * depth) ** -0.5),
        (block.mlp.c_fc.weight, (2 * width) ** -0.5),
        (block.mlp.c_proj.weight, scale * (2 * depth) ** -0.5),
        (model.mlm_head.dense.weight, (2 * width) ** -0.5),
        (model.mlm_head.fc.weight, scale * (2 * depth) ** -0.5),
        (model.safl.pos_embeding, math.sqrt(2 / width)),
        (model.safl.part_tokens, math.sqrt(2 / width)),
    ):
        # Five standard errors of an estimated standard deviation.
        assert weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * weight.numel()))
    assert not model.classifier.bias.any()
    xavier = math.sqrt(6 / (width + 3 * width))
    assert model.shared_transformer.resblocks[0].attn.in_proj_weight.abs().max() <= xavier


def test_full_size_parameter_counts() -> None:
    """ViT-B/16 with the paper's losses on CUHK-PEDES: 447 tensors, 215,638,011 numbers, and the groups' sizes."""
    from cmlfa.model.clip import ClipGeometry

    geometry = ClipGeometry(512, 768, 12, 16, 77, 49408, 512, 12)
    with torch.device("meta"):
        model = CMLFA(ModelSettings(loss_names="sdm+mlm+id+itc"), geometry, 11003)
    state = model.state_dict()
    assert len(state) == 447
    assert sum(tensor.numel() for tensor in state.values()) == 215_638_011
    assert state["base_model.visual.positional_embedding"].shape == (193, 768)
    optimizer = build_optimizer(get_args([]), model)
    groups = [(group["lr"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(1e-5, 4e-5, 198), (2e-5, 0.0, 215), (5e-5, 4e-5, 30), (5e-5, 0.0, 4)]
    assert len(official_param_order(model)) == 447


def test_model_defaults_are_those_of_the_command_line() -> None:
    args = vars(get_args([]))
    for name, value in vars(ModelSettings()).items():
        assert args[name] == value, name


def test_flags_an_official_file_does_not_know_take_their_defaults(toy_clip: Any) -> None:
    official = {"pretrain_choice": str(toy_clip), "img_size": [64, 32], "vocab_size": 96, "text_length": 12}
    expected = ModelSettings(str(toy_clip), (64, 32), vocab_size=96, text_length=12)
    assert ModelSettings.of(official) == expected == ModelSettings.of(EasyDict(official))
    assert build_model(EasyDict(official), 5).settings == expected


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"text_length": 13}, "--text_length 13 is longer than the 12 positions"),
        ({"vocab_size": 100}, "--vocab_size 100 differs from the 96 rows"),
        ({"img_size": (8, 32)}, "--img_size 8,32 is smaller than one patch"),
        ({"img_size": (8,)}, "--img_size expects height,width"),
        ({"loss_names": "sdm+triplet"}, "--loss_names expects losses out of .* not 'triplet'"),
        ({"loss_names": " + "}, "not nothing"),
        ({"lfa_attention": "tokens"}, "--lfa_attention must be one of"),
        ({"lfa_heads": 7}, "--lfa_heads 7 must divide"),
        ({"precision": "fp8"}, "--precision must be one of"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"cmt_depth": 0}, "--cmt_depth must be at least 1"),
    ],
)
def test_contradicting_flags(toy_args: Callable[..., Any], flags: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        build_model(toy_args(**flags), 5)


def test_another_vocabulary_is_fine_without_mlm(toy_args: Callable[..., Any]) -> None:
    assert build_model(toy_args(vocab_size=100, loss_names="sdm+id"), 5).settings.vocab_size == 100


def test_positions_of_a_grid_that_is_not_square() -> None:
    with pytest.raises(CheckpointError, match="one more than a square number"):
        resize_pos_embed(torch.zeros(9, 4), 2, 2)


def test_resizing_keeps_the_class_position_and_the_dtype() -> None:
    table = torch.randn(17, 3, dtype=torch.float64)
    resized = resize_pos_embed(table, 6, 2)
    assert resized.shape == (13, 3) and resized.dtype == torch.float64
    assert torch.equal(resized[0], table[0])
    assert torch.equal(resize_pos_embed(table, 4, 4), table)


def test_unknown_parameters_have_no_official_place() -> None:
    with pytest.raises(ValueError, match="mystery"):
        official_param_order(nn.ModuleDict({"mystery": nn.Linear(1, 1)}))


def imported_modules(source: Path) -> set[str]:
    """Every module a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_the_model_side_never_imports_the_training_side() -> None:
    package = Path(cmlfa.__file__).parent
    for source in (*(package / "model").glob("*.py"), package / "objectives.py"):
        ours = {name for name in imported_modules(source) if name.startswith("cmlfa")}
        assert all(name.startswith(("cmlfa.model", "cmlfa.objectives")) for name in ours), source


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = "import sys, cmlfa, cmlfa.model, cmlfa.datasets; print('torch' in sys.modules, 'open_clip' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
    assert not hasattr(cmlfa, "no_such_name") and not hasattr(cmlfa.model, "no_such_name")

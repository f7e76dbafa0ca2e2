"""Reference numbers as models and tensors; a small training folder; tiny models; the paper's command for them."""

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

GOLDEN = "dp_gen"
WORDS = "a an and the man woman person with in is wearing has black blue red green white hair shirt pants skirt coat".split()
README_FLAGS = [
    *("--pretrained_model_hf", "runwayml/stable-diffusion-v1-5"),
    *("--max_train_steps", "30000"),
    *("--num_train_epochs", "30000"),
    *("--train_batch_size", "32"),
    *("--lr", "1e-5"),
    *("--unet_lr_scale", "1.0"),
    *("--checkpointing_steps", "200"),
    *("--mixed_precision", "bf16"),
    "--keep_only_last_checkpoint",
    *("--keep_interval", "10000"),
    *("--seed", "42"),
    *("--image_encoder_hf", "openai/clip-vit-large-patch14"),
    *("--img_token_num", "1"),
    *("--MAX_REFERENCE_ATTRIBUTE_NUM", "3"),
    *("--resolution", "128"),
    *("--text_image_linking", "control"),
    "--disable_flashattention",
    "--train_image_encoder",
    *("--image_encoder_trainable_layers", "2"),
    *("--reference_attribute_types", "hair_uppercloth_bottomcloth"),
    "--mask_loss",
    "--attribute_loc",
    *("--attribute_loc_weight", "1e-3"),
    *("--attribute_localization_loss", "balanced_l1"),
    *("--resume_from_checkpoint", "latest"),
]
COLOURS = {"black": (25, 25, 25), "blue": (30, 50, 200), "red": (200, 30, 30), "green": (30, 160, 40)}


def decoded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Stored tensors in the form the code uses (uint8 pictures to their ranges, masks to floats)."""
    result = {}
    for name, tensor in tensors.items():
        last = name.split(".")[-1]
        if tensor.dtype == torch.uint8 and last == "pix_v":
            tensor = tensor.float() / 127.5 - 1
        elif tensor.dtype == torch.uint8 and last.endswith("seg_maps"):
            tensor = tensor.float()
        elif tensor.dtype == torch.uint8 and last.startswith(("attribute_v", "references", "images_")):
            tensor = tensor.float() / 255
        elif tensor.dtype == torch.float16:
            tensor = tensor.float()
        elif tensor.dtype == torch.int16:
            tensor = tensor.long()
        result[name] = tensor
    return result


def golden_args(case: Any, fields: dict[str, Any] | None = None) -> argparse.Namespace:
    """The flags of a stored case: fields set on the defaults, model names made paths."""
    from dp_gen import parse_args

    args = parse_args(default=True)
    for name, value in {**case.case.get("args", {}), **(fields or {})}.items():
        setattr(args, {"loc_latyers": "loc_layers"}.get(name, name), value)
    root = case.folder.parent
    args.pretrained_model_hf = str(root / "tiny_sd")
    args.image_encoder_hf = str(root / "tiny_clip")
    return args


def golden_kinds(prefix: str) -> list[str]:
    """Names of the stored cases that begin so; one placeholder, which skips, without TBPS_GOLDEN."""
    root = os.environ.get("TBPS_GOLDEN")
    found = sorted(path.parent.name for path in Path(root, GOLDEN).glob(f"{prefix}*/case.json")) if root else []
    return found or ["golden-folder-absent"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the argument `stored` runs once per stored case whose name begins with its `stored_prefix`."""
    if "stored" in metafunc.fixturenames:
        prefix = metafunc.function.stored_prefix
        metafunc.parametrize("stored", golden_kinds(prefix))


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: dict[str, float], name: str) -> None:
    """|got - want| <= atol + rtol * max |want|."""
    want = want.float()
    assert got.shape == want.shape, name
    allowed = tolerance["atol"] + tolerance["rtol"] * float(want.abs().max())
    assert float((got.detach().float() - want).abs().max()) <= allowed, name


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds tiny models under the names of the paper's command."""
    from tbps_world.tiny.dp_gen import write_tiny_models

    out = tmp_path_factory.mktemp("models")
    write_tiny_models(out, WORDS)
    return out


@pytest.fixture(scope="session")
def training_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven hand-made samples, of which six are for training; their sizes and numbers of segments differ."""
    root = tmp_path_factory.mktemp("dp")
    write_training_folder(root)
    return root


def write_training_folder(root: Path, count: int = 7) -> None:
    """Coloured figures with masks and captions."""
    names = list(COLOURS)
    ids = [f"{number:09d}" for number in range(count)]
    for number, img_id in enumerate(ids):
        height, width = 96 + 4 * number, 48 + 2 * number
        upper, lower = names[number % 4], names[(number + 1) % 4]
        pixels = np.random.default_rng(number).integers(100, 140, (height, width, 3))
        mask = np.zeros((height, width), np.uint8)
        boxes = {1: (16, 4, 32, 20), 2: (10, 20, 40, 56), 3: (12, 56, 36, height - 8)}
        for value, (left, top, right, bottom) in boxes.items():
            mask[top:bottom, left:right] = value
            pixels[top:bottom, left:right] = COLOURS[{1: "black", 2: upper, 3: lower}[value]]
        text, segments = "a person with", []
        for value, label, phrase in (
            (1, "hair", "black hair"),
            (2, "uppercloth", f"a {upper} coat"),
            (3, "bottomcloth", f"{lower} pants"),
        ):
            text += f" {phrase}" if value == 1 else f" and {phrase}"
            if value != 1 or number % 3:
                segments.append({"id": value, "label": label, "bbox": list(boxes[value]), "end": len(text)})
        chunk = root / img_id[:5]
        chunk.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(chunk / f"{img_id}.png")
        np.save(chunk / f"{img_id}.npy", mask)
        (chunk / f"{img_id}.json").write_text(json.dumps({"description": text, "segments": segments}), encoding="utf-8")
    for name, chosen in (("", ids), ("_train", ids[:-1]), ("_test", ids[-1:])):
        (root / f"img_ids{name}.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")


@pytest.fixture
def small_args(tiny_models: Path) -> Callable[..., argparse.Namespace]:
    """`small_args(**fields)`: default flags for the tiny models at resolution 64, with `fields` set."""
    from dp_gen import parse_args

    def make(**fields: Any) -> argparse.Namespace:
        args = parse_args(default=True)
        args.pretrained_model_hf = str(tiny_models / "runwayml" / "stable-diffusion-v1-5")
        args.image_encoder_hf = str(tiny_models / "openai" / "clip-vit-large-patch14")
        args.resolution, args.MAX_REFERENCE_ATTRIBUTE_NUM = 64, 3
        for name, value in fields.items():
            setattr(args, name, value)
        return args

    return make


@pytest.fixture
def batch(training_folder: Path, small_args: Callable[..., argparse.Namespace]) -> dict[str, torch.Tensor]:
    """A batch of three samples with 2, 3 and 3 references."""
    from dp_gen import DiversePersonDataset, collate_fn, load_tokenizer

    args = small_args()
    dataset = DiversePersonDataset(training_folder, load_tokenizer(args.pretrained_model_hf), args)
    torch.manual_seed(0)
    return collate_fn([dataset[index] for index in range(3)])


@pytest.fixture
def train_flags(tiny_models: Path, training_folder: Path) -> Callable[..., list[str]]:
    """`train_flags(output_dir, *more)`: the README's flags, flags for the size, and `more`."""

    def flags(output_dir: Path, *more: str) -> list[str]:
        return [
            *README_FLAGS,
            *("--pretrained_model_hf", str(tiny_models / "runwayml" / "stable-diffusion-v1-5")),
            *("--image_encoder_hf", str(tiny_models / "openai" / "clip-vit-large-patch14")),
            *("--dataset_name", str(training_folder), "--logging_dir", str(output_dir / "logs")),
            *("--output_dir", str(output_dir), "--resolution", "64", "--train_batch_size", "2"),
            *("--dataloader_num_workers", "0", "--max_train_steps", "5", "--checkpointing_steps", "2"),
            *("--mixed_precision", "no", "--lr", "1e-3", "--log_every", "2", "--report_to", "none"),
            *more,
        ]

    return flags


@pytest.fixture
def fresh_accelerate() -> Iterator[Callable[[], None]]:
    """accelerate keeps one state per process; a second run in a process needs it forgotten."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def forget() -> None:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()

    forget()
    yield forget
    forget()


@pytest.fixture
def helpers() -> Any:
    """This file's functions (test folders are no packages)."""
    import types

    return types.SimpleNamespace(
        assert_close=assert_close,
        decoded=decoded,
        golden_args=golden_args,
        write_training_folder=write_training_folder,
        README_FLAGS=README_FLAGS,
    )

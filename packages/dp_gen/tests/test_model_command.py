"""`tbps-model` on the files of Diverse Person."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tbps_common.cli import model_main
from tbps_world.tiny.dp_gen import write_tiny_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_models(tmp_path_factory.mktemp("models"), ["red", "shirt"])


def layout_of(path: Path, tmp_path: Path) -> str:
    assert model_main(["inspect", str(path), "--no_checksum", "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["paper"] == "Diverse Person" and found["fits"] is True
    return found["layout"]


def test_the_models_it_starts_from_are_recognised(models: tuple[Path, Path], tmp_path: Path) -> None:
    sd, clip = models
    assert layout_of(sd, tmp_path).startswith("Stable Diffusion, diffusers' layout")
    for part, name in (("unet", "U-Net"), ("vae", "VAE"), ("text_encoder", "text encoder")):
        assert layout_of(sd / part, tmp_path).startswith(name)
    assert layout_of(clip, tmp_path).startswith("CLIP, Hugging Face's layout")


@pytest.mark.parametrize(
    ("controller", "layout"), [("controller", "Diverse Person"), ("postfuse_module", "FastComposer")]
)
def test_a_checkpoint_is_recognised(controller: str, layout: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    from dp_gen.model.controller import DiversePersonController

    sd, clip = models
    vision = load_file(clip / "model.safetensors")
    state = {f"image_encoder.{name}": tensor for name, tensor in vision.items() if name.startswith("vision_model.")}
    state["image_encoder.visual_projection.weight"] = vision["visual_projection.weight"]
    width = len(state["image_encoder.visual_projection.weight"])
    state |= {f"{controller}.{name}": value for name, value in DiversePersonController(width).state_dict().items()}
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        state |= {f"{part}.{name}": value for name, value in load_file(sd / part / f"{file}.safetensors").items()}
    save_file(state, tmp_path / "model.safetensors")
    assert layout_of(tmp_path / "model.safetensors", tmp_path).startswith(f"checkpoint of {layout}")

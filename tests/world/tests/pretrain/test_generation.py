"""Start weights of what generates and describes pictures: a few steps, then the papers' own loaders read them."""

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from tbps_world.synth.attributes import Person, sample_people
from tbps_world.synth.streams import stream


def few_people(count: int) -> list[Person]:
    return sample_people(min(count, 12), stream(3, "test", "all", 0, "people"))


def trained(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    module: Any = import_module(f"tbps_world.pretrain.{name}")
    monkeypatch.setattr("tbps_world.pretrain.attributes.start_people", few_people)
    monkeypatch.setattr(module, "start_people", few_people, raising=False)
    monkeypatch.setattr(module, "LEFT_ASIDE", 4, raising=False)
    monkeypatch.setattr(module, "PEOPLE", 6)
    figures = module.train(folder, seed=0, steps=2)
    assert figures and all(value == value for value in figures.values()), figures
    return figures


def test_diffusion_and_its_image_encoder_fit_dp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dp_gen.model import DiversePersonModel
    from dp_gen.model.captions import load_tokenizer
    from dp_gen.model.parts import load_generation_scheduler, load_training_scheduler
    from dp_gen.options import parse_args

    monkeypatch.setattr("tbps_world.pretrain.diffusion.SAMPLES", 2)
    figures = trained("diffusion", tmp_path / "diffusion", monkeypatch)
    assert 0 <= figures["upper_colour_sampled"] <= 1
    trained("image_encoder", tmp_path / "image_encoder", monkeypatch)
    flags = [
        "--pretrained_model_hf",
        str(tmp_path / "diffusion"),
        "--image_encoder_hf",
        str(tmp_path / "image_encoder"),
    ]
    args: argparse.Namespace = parse_args([*flags, "--attribute_loc"])
    model = DiversePersonModel.from_pretrained(args)
    assert model.capture is not None
    assert load_training_scheduler(args).config.prediction_type == "v_prediction"
    assert load_generation_scheduler(args).config.timestep_spacing == "trailing"
    assert load_tokenizer(str(tmp_path / "diffusion")).model_max_length == 77
    with torch.no_grad():
        latents = model.encode_latents(torch.zeros(1, 3, 128, 128))
    assert latents.shape == (1, 4, 16, 16)


@pytest.mark.parametrize("name", ["detector", "pose", "captioner"])
def test_what_mra_dad_reads(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import (
        AutoModelForImageTextToText,
        AutoModelForZeroShotObjectDetection,
        AutoProcessor,
        VitPoseForPoseEstimation,
        VitPoseImageProcessor,
    )

    trained(name, tmp_path, monkeypatch)
    if name == "detector":
        assert AutoModelForZeroShotObjectDetection.from_pretrained(tmp_path).config.max_text_len >= 77
        ids = AutoProcessor.from_pretrained(tmp_path).tokenizer("a red coat.").input_ids
        assert ids[0] == 101 and ids[-2:] == [1012, 102]  # what its attention to the text is cut at
    elif name == "pose":
        assert VitPoseForPoseEstimation.from_pretrained(tmp_path).config.num_labels == 17
        assert VitPoseImageProcessor.from_pretrained(tmp_path).size == {"height": 64, "width": 48}
    else:
        AutoModelForImageTextToText.from_pretrained(tmp_path)
        AutoProcessor.from_pretrained(tmp_path)


def test_the_colour_that_a_caption_names() -> None:
    from tbps_world.pretrain.captioner import colour_said

    text = "a man in a jet - black t - shirt and a pair of tan jeans is walking."
    assert colour_said(text, "upper") == "black" and colour_said(text, "lower") == "beige"
    assert colour_said("a man in a tee and red shoes.", "upper") is None


def test_captions_without_colours() -> None:
    import json

    from tbps_world.toys.dp_colours import _without_colours

    text = "An elderly man wears an emerald shirt, a jet-black skirt and red shoes."
    phrases = ["an emerald shirt", "a jet-black skirt"]
    segments = [
        {"start": text.index(phrase), "end": text.index(phrase) + len(phrase), "phrase": phrase} for phrase in phrases
    ]
    found = _without_colours({"description": text, "segments": segments})
    assert found["description"] == "An elderly man wears a shirt, a skirt and shoes."
    for segment in found["segments"]:
        assert found["description"][segment["start"] : segment["end"]] == segment["phrase"], json.dumps(found)

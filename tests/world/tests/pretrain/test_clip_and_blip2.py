"""The start weights of CMLFA and FAFA: a step of training, then the papers' own loaders."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from cmlfa.model import build_model
from cmlfa.search import open_clip_model
from fafa.model.fafa import load_model_and_preprocess
from tbps_world.cli import train_tiny_main
from tbps_world.pretrain.clip import SIDE, contrast, fits


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("start")
    assert train_tiny_main(["blip2", "--out", str(folder), "--steps", "1"]) == 0  # and clip, which it begins with
    return folder


def test_cmlfa_and_tbps_index_read_clip(start: Path) -> None:
    file = str(start / "clip/clip.pt")
    flags = {"pretrain_choice": file, "img_size": (SIDE, SIDE), "stride_size": 16, "text_length": 40}
    model = build_model({**flags, "loss_names": "sdm+itc", "device": "cpu"})
    assert torch.equal(
        model.state_dict()["base_model.visual.class_embedding"],
        torch.load(file, weights_only=True)["visual.class_embedding"],
    )
    retriever = open_clip_model(file, device="cpu")
    pixels = retriever.transform(Image.new("RGB", (64, 128), (200, 30, 30)))
    assert pixels.shape == (3, SIDE, SIDE)
    assert retriever.encode_images(pixels[None])["feature"].norm().item() == pytest.approx(1, abs=1e-4)


def test_fafa_reads_blip2_and_freezes_the_tower_of_clip(start: Path) -> None:
    model, _, _ = load_model_and_preprocess("blip2_fafa_cpr", start / "blip2/tiny.yaml")
    tower = torch.load(start / "clip/clip.pt", weights_only=True)
    assert torch.equal(
        model.state_dict()["visual_encoder.trunk.embeddings.class_embedding"], tower["visual.class_embedding"]
    )
    assert not any(parameter.requires_grad for parameter in model.visual_encoder.parameters())
    written = torch.load(start / "blip2/blip2.pt", weights_only=True)["model"]
    assert torch.equal(model.query_tokens, written["query_tokens"])


def test_captions_that_say_the_same_are_no_negatives() -> None:
    said = torch.tensor([[1, -1], [1, 2], [0, 2]])  # -1: not said
    worn = torch.tensor([[1, 0], [1, 2], [0, 2]])
    fitting = fits(said, worn)
    assert fitting.tolist() == [[True, True, False], [False, True, False], [False, False, True]]
    perfect = torch.where(fitting, 0.0, -100.0)
    # Two equal candidates: the entropy of a fair coin in the first row and in the second column.
    assert contrast(perfect, fitting).item() == pytest.approx(torch.log(torch.tensor(2.0)).item() / 3, rel=1e-5)

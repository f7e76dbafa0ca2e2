"""cmlfa:RUN and clip:FILE as retrievers of tbps-index and tbps-search."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from tbps_common.cli import index_main, search_main
from tbps_common.search.retriever import Query, encode_images, encode_queries, open_retriever
from tbps_world.tiny.clip import write_tiny_clip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    write_tiny_clip(path)
    return path


@pytest.fixture
def photos(world: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for image in sorted((world / "CUHK-PEDES" / "imgs" / "cam_a").iterdir())[:5]:
        shutil.copy(image, folder / image.name)
    return folder


def test_clip_features_are_those_of_open_clip(tiny: Path, photos: Path) -> None:
    model = open_retriever(f"clip:{tiny}", device="cpu")
    files = [str(path) for path in sorted(photos.iterdir())]
    ((places, features, problems),) = encode_images(model, files)
    assert places == [0, 1, 2, 3, 4] and problems == []
    state = torch.load(tiny, weights_only=True)
    settings = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}
    clip = open_clip.CLIP(
        64, {"layers": 2, "width": 64, "head_width": 64, "patch_size": 16, "image_size": 64}, settings, quick_gelu=True
    ).eval()
    clip.load_state_dict(state)
    transform = open_clip.image_transform(64, is_train=False, resize_mode="squash")
    with torch.no_grad(), Image.open(files[0]) as image:
        expected = clip.encode_image(transform(image)[None], normalize=True)
        words = clip.encode_text(open_clip.SimpleTokenizer(context_length=32)(["a man"]), normalize=True)
    torch.testing.assert_close(features["feature"][:1], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encode_queries(model, [Query("a man")])["feature"], words, atol=1e-5, rtol=1e-4)
    with Image.open(files[0]) as image:
        both = encode_queries(model, [Query("a man", image)])["feature"]
    torch.testing.assert_close(both, normalize(words + expected, dim=1), atol=1e-5, rtol=1e-4)


def test_both_models_search_one_gallery(
    tiny: Path, trained_run: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gallery, hits = str(tmp_path / "people.lance"), tmp_path / "hits.json"
    for model in (f"clip:{tiny}", f"cmlfa:{trained_run}"):
        assert index_main(["--model", model, "--images", str(photos), "--out", gallery, "--device", "cpu"]) == 0
        assert capsys.readouterr().out.splitlines()[-1] == "added 5, updated 0, removed 0, skipped 0, total 5"
        asked = ["--model", model, "--gallery", gallery, "--text", "a red shirt", "--json", str(hits), "--topk", "3"]
        assert search_main([*asked, "--device", "cpu", "--output", str(tmp_path / "hits.png")]) == 0
        found = json.loads(hits.read_text())
        assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)
        assert {Path(hit["path"]).parent for hit in found} == {photos} and len(found) == 3


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("cmlfa:nowhere", "no such run directory"),
        ("clip:nowhere.pt", "open_clip has no model"),
        ("clip:ViT-B-16/nowhere", "neither a file nor among"),
    ],
)
def test_a_missing_checkpoint_is_named(
    model: str, words: str, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert index_main(["--model", model, "--images", str(photos), "--out", str(tmp_path / "g.lance")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "g.lance").exists()

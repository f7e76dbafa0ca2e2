"""fafa-index and fafa-search on one's own folder."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from fafa.cli import index_main, search_main
from fafa.evaluation import topk_mean_similarity
from fafa.model import Blip2FAFACPR
from fafa.processors import BlipCaptionProcessor
from fafa.transforms import squarepad_transform_test
from tbps_common.images import read_image
from tbps_common.search.gallery import list_galleries

NAME = "tuned_last_recall_at1.pt"


@pytest.fixture
def flags(trained_run: Path) -> list[str]:
    return ["--exp-dir", str(trained_run), "--model-name", NAME, "--device", "cpu"]


@pytest.fixture
def pictures(tmp_path: Path, toy: Path) -> Path:
    folder = tmp_path / "pictures"
    shutil.copytree(toy / "itcpr" / "LAST", folder / "some" / "deep")
    return folder


def test_search_finds_what_the_model_ranks_first(
    flags: list[str], pictures: Path, tmp_path: Path, toy: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, hits = tmp_path / "people.lance", tmp_path / "hits.png"
    assert index_main([*flags, "--images", str(pictures), "--out", str(out), "--num-workers", "0"]) == 0
    (gallery,) = list_galleries(out)
    (feature,) = gallery.features
    assert (feature.reduce, feature.k, feature.shape) == ("topk_mean", 6, (8, 16))
    paths = gallery.files()
    reference = toy / "syncpr" / "test1" / "sub_img" / "img_left" / "0-0_left.png"
    text = "Now wearing a BLUE coat!"
    capsys.readouterr()
    more = ["--index", str(out), "--image", str(reference), "--text", text, "--output", str(hits), "--topk", "3"]
    assert search_main([*flags, *more]) == 0
    found = re.findall(r"^ +(\d+) +(-?\d\.\d{4})  (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert [row[0] for row in found] == ["1", "2", "3"]

    model = Blip2FAFACPR.from_pretrained(str(trained_run / "model_config.yaml")).eval()
    from fafa.checkpoint import load_checkpoint

    load_checkpoint(model, trained_run / "saved_models" / NAME)
    transform = squarepad_transform_test(28)
    with torch.no_grad():
        image = transform(read_image(reference))[None]
        query = model.forward_query(image, [BlipCaptionProcessor()(text)])
        images = torch.stack([transform(read_image(path)) for path in paths])
        scores = topk_mean_similarity(query, model.extract_target_features(images)[0], 6)[0]
    best = scores.sort(descending=True, stable=True)
    assert [row[2] for row in found] == [paths[place] for place in best.indices[:3].tolist()]
    assert [float(row[1]) for row in found] == pytest.approx(best.values[:3].tolist(), abs=1e-3)
    with Image.open(hits) as picture:
        assert min(picture.size) > 200


def test_index_is_completed_not_computed_again(
    flags: list[str], pictures: Path, tmp_path: Path, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "people.lance"
    more = ["--images", str(pictures), "--out", str(out), "--num-workers", "0", "--batch-size", "2"]
    assert index_main([*flags, *more]) == 0
    before = list_galleries(out)[0].table.search().to_arrow()["tokens"].to_pylist()
    shutil.copyfile(toy / "itcpr" / "LAST" / "000009" / "9_9.png", pictures / "new.png")
    assert index_main([*flags, *more]) == 0
    last = f"added 1, updated 0, removed 0, skipped 0, total {len(before) + 1}"
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert list_galleries(out)[0].table.search().to_arrow()["tokens"].to_pylist()[:-1] == before


def test_index_of_another_model_is_refused(
    flags: list[str], pictures: Path, tmp_path: Path, trained_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "run"
    shutil.copytree(trained_run, other)
    path = other / "saved_models" / NAME
    content = torch.load(path, weights_only=True)
    content["model"]["text_proj.weight"] += 1
    torch.save(content, path)
    out = tmp_path / "people.lance"
    assert index_main([*flags, "--images", str(pictures), "--out", str(out), "--num-workers", "0"]) == 0
    picture = next(pictures.rglob("*.png"))
    more = ["--index", str(out), "--image", str(picture), "--text", "in red", "--output", str(tmp_path / "hits.png")]
    assert search_main([*flags, *more, "--exp-dir", str(other)]) == 2
    assert "holds no features of" in capsys.readouterr().err
    assert not (tmp_path / "hits.png").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--text", " "], "--text is empty"),
        (["--text", "in red", "--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--text", "in red", "--index", "nowhere.safetensors"], "nowhere.safetensors"),
    ],
)
def test_wrong_flags_are_one_line(
    more: list[str], said: str, flags: list[str], toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = toy / "itcpr" / "LAST" / "000009" / "9_9.png"
    assert search_main([*flags, "--image", str(picture), "--index", "absent.safetensors", *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_pictures_stored_lying_are_read_as_they_are_shown(
    flags: list[str], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "phone"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    with Image.open(next(pictures.rglob("*.*g"))) as image:
        image.save(folder / "upright.png")
        image.transpose(Image.Transpose.ROTATE_90).save(folder / "lying.png", exif=exif)
    out = tmp_path / "people.lance"
    assert index_main([*flags, "--images", str(folder), "--out", str(out), "--num-workers", "0"]) == 0
    lying, straight = map(torch.tensor, list_galleries(out)[0].table.search().to_arrow()["tokens"].to_pylist())
    torch.testing.assert_close(lying, straight)

    def scores(reference: str) -> list[str]:
        capsys.readouterr()
        more = ["--index", str(out), "--image", str(folder / reference), "--text", "a blue coat"]
        assert search_main([*flags, *more, "--output", str(tmp_path / "hits.png")]) == 0
        return re.findall(r"-?\d\.\d{4}", capsys.readouterr().out)

    assert scores("lying.png") == scores("upright.png")
